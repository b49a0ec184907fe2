"""Entry points: ``ray job submit -- python -m jobs.<name>``."""
