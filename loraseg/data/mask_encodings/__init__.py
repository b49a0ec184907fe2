"""Compact encodings of masks: COCO run lengths and polygons."""
