"""Digests of what MatchMask++ is given, by which it knows what is to be done anew."""

import hashlib
import json

from loraseg.data.readers.folder import DatasetFolder
from loraseg.factory.content import content_digest
from loraseg.factory.pipeline import DataDigests, PipelineConfig
from loraseg.factory.pseudo import unlabelled
from loraseg.factory.sources import open_masks
from loraseg.storage import open_store
from loraseg.train.closed_input import chosen_samples

__all__ = ["data_digests"]


def data_digests(config: PipelineConfig) -> DataDigests:
    """Look at all data; objects are read unless their store lists etags.

    Raises:
        ConfigError: There are fewer labelled images than wanted.
        DatasetError: Some data is missing or cannot be used.
        StoreError: A store cannot be read.
    """
    folder = DatasetFolder.open(config.real)
    used = (chosen_samples(folder, "train", config.images), folder.samples("val"))
    masks = open_masks(config.real).names()[: config.images]
    return DataDigests(
        labelled=_sha256([folder.digest(samples) for samples in used]),
        masks=content_digest(open_store(config.real), [mask.file for mask in masks]),
        unlabelled=content_digest(open_store(config.unlabelled), unlabelled(config.unlabelled)),
    )


def _sha256(values: list[str]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
