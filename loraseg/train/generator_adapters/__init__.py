"""Training of generator adapters: LoRA on a diffusion model with region attention."""
