"""What stays frozen: where weights come from, tokenizers, the CLIP of the index."""
