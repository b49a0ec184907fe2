"""What every trainer shares: loop, checkpoints, LoRA layers, task state and progress."""
