"""A small procedural world and small models pretrained on it, which run on a laptop.

``world`` renders scenes, ``models`` has the models with their training and checks, and ``studies``
has experiments that are not part of the wheel. ``pretrain`` reproduces the shipped weights.
"""
