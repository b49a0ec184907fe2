"""Segmenters with a fixed list of classes: networks, losses and checkpoints."""
