"""Labelled images: label spaces, masks, readers, splits and joint transforms.

Class ids differ between datasets, so classes are matched by name; pixels of a class that a dataset
lacks are 255, ignored. Synthetic pairs are read by ``loraseg.ShardStream`` (torch) and
``actors.shards.ray_dataset`` (Ray Data).
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
