"""Labelled images: label spaces, masks, readers, splits and joint transforms.

Why 255 and names: ids differ from set to set and only names mean the same thing everywhere, so sets
are joined by name, and what one of them lacks is 255, ignored.
"""

from loraseg.data.datasets import Dataset, Sample, digest_samples, load_pair
from loraseg.data.labels import IGNORE, LabelSpace, read_classes, write_classes
from loraseg.data.masks import encode_mask, read_mask, write_mask
from loraseg.data.readers.opening import open_dataset
from loraseg.data.splits import few_shot
from loraseg.data.transforms import AugmentConfig, augment

__all__ = [
    "IGNORE",
    "AugmentConfig",
    "Dataset",
    "LabelSpace",
    "Sample",
    "augment",
    "digest_samples",
    "encode_mask",
    "few_shot",
    "load_pair",
    "open_dataset",
    "read_classes",
    "read_mask",
    "write_classes",
    "write_mask",
]
