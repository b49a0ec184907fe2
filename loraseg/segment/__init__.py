"""Segmentation: open-vocabulary and closed-set models, losses, metrics and rendering."""

__all__ = [
    "ConfusionMatrix",
    "Predictor",
    "SegmentationBase",
    "catseg_bce",
    "hmean",
    "load_base",
    "save_base",
]

from loraseg.segment.metrics import ConfusionMatrix, hmean
from loraseg.segment.open_vocabulary.base import SegmentationBase, load_base, save_base
from loraseg.segment.open_vocabulary.losses import catseg_bce
from loraseg.segment.open_vocabulary.predictor import Predictor
