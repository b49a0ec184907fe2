"""Segmenters that take any list of class names: CAT-Seg, inference on large images, losses."""
