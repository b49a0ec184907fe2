"""A small procedural world, and small models pretrained on it: everything runs on a laptop."""
