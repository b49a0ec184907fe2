"""Experiments on the miniature world, run by hand with ``python -m``."""
