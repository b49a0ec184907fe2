"""Training of segmenter adapters: LoRA on a frozen open-vocabulary segmenter, one per domain."""
