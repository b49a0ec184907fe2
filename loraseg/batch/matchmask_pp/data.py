"""Digests of the data of MatchMask++, which decide which stages run again."""

import hashlib
import json

from loraseg.batch.core.content_digest import content_digest
from loraseg.batch.matchmask_pp.pipeline import PipelineConfig, PipelineDataDigests
from loraseg.batch.matchmask_pp.pseudo_masks import list_images
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.data import digest_samples, open_dataset
from loraseg.storage import open_store
from loraseg.train.closed_set.data_spec import select_samples

__all__ = ["data_digests"]


def data_digests(config: PipelineConfig) -> PipelineDataDigests:
    """Compute the digests of all data; objects are read unless their store lists etags.

    Raises:
        ConfigError: There are fewer labelled images than ``config.images``.
        DatasetError: Some data is missing or cannot be used.
        StoreError: A store cannot be read.
    """
    dataset = open_dataset(config.real)
    used = (select_samples(dataset, "train", config.images), dataset.samples("val"))
    masks = MaskSource(config.real).list_conditions()[: config.images]
    return PipelineDataDigests(
        labelled=_sha256([digest_samples(dataset, samples) for samples in used]),
        masks=content_digest(open_store(config.real), [mask.file for mask in masks]),
        unlabelled=content_digest(open_store(config.unlabelled), list_images(config.unlabelled)),
    )


def _sha256(values: list[str]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
