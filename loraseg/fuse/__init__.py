"""Fusion of adapters: mixing weights from distances, mixes, and per-image mixes in one batch."""

__all__ = [
    "AdapterBank",
    "LateFusion",
    "Mix",
    "concat_lora",
    "fuse",
    "late_fusion",
    "merged",
    "mixing_weights",
]

from loraseg.fuse.bank import AdapterBank
from loraseg.fuse.concat import concat_lora
from loraseg.fuse.late import LateFusion, late_fusion
from loraseg.fuse.merged import merged
from loraseg.fuse.mix import Mix, fuse
from loraseg.fuse.weights import mixing_weights
