"""Mixing adapters: weights from distances, exact concatenation, late fusion of score maps."""

__all__ = ["concat_lora", "fuse", "late_fusion", "mixing_weights"]

from loraseg.fuse.concat import concat_lora, fuse
from loraseg.fuse.late import late_fusion
from loraseg.fuse.weights import mixing_weights
