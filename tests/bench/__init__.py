"""Measurements as ratios within one process: ``python -m tests.bench NAME`` prints JSON lines."""

from loraseg.compat import prepare_torchvision

prepare_torchvision()  # before peft, which some rivals are
