"""Adapters: what they are, how they are stored (peft's format) and how they act on a model."""
