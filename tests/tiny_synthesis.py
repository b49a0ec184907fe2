"""Inputs of tiny syntheses: pipeline, masks and segmenter as files. A run takes a second."""

import dataclasses

import numpy as np
import torch

from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.data import LabelSpace, write_classes, write_mask
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import rows_digest
from loraseg.segment.closed_set.checkpoint import encode_closed_set_segmenter
from loraseg.segment.closed_set.networks import NetworkConfig, build_network
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.vote import FilterConfig
from tests.unit.train.tiny_generator import write_pipeline

CLASSES = ("road", "sky", "car", "sidewalk")
STATUSES = ("ok", "dropped", "bad_mask", "duplicate")


def mask(number, size=(32, 32)):
    """Return a mask of blocks with some ignored pixels."""
    random = np.random.default_rng(number)
    blocks = random.integers(0, 2 + number % 3, (size[0] // 4, size[1] // 4)).astype(np.uint8)
    ids = np.kron(blocks, np.ones((4, 4), dtype=np.uint8))
    ids[:2, :3] = 255
    return ids


def write_masks(folder, count, *, start=0):
    """Write masks as a dataset folder without images; return it."""
    inside = folder / "masks" / "train"
    inside.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        write_mask(inside / f"{number:03d}.png", mask(number))
    write_classes(folder / "classes.json", LabelSpace(CLASSES))
    return folder


def write_segmenter(path, seed=0):
    torch.manual_seed(seed)
    network = build_network(NetworkConfig(width=8), len(CLASSES))
    path.write_bytes(encode_closed_set_segmenter(network, CLASSES, dtype=torch.float16))
    return path


def write_inputs(folder, masks=5):
    """Write pipeline, masks and segmenter below a folder, unless they exist; return it."""
    if not (folder / "pipeline").exists():
        write_pipeline(folder / "pipeline")
        write_segmenter(folder / "segmenter.safetensors")
        write_masks(folder / "masks", masks)
    return folder


def settings(folder, output, **changes):
    """Return a config for the inputs in ``folder``.

    ``changes`` are fields of the config, or ``images`` and ``steps`` of its sampling.
    """
    sampling = SamplingConfig(
        images=changes.pop("images", 3), steps=changes.pop("steps", 2), scheduler="ddim"
    )
    config = SynthesisConfig(
        masks=str(folder / "masks"),
        output=str(output),
        base=str(folder / "pipeline"),
        segmenter=str(folder / "segmenter.safetensors"),
        sampling=sampling,
        filter=FilterConfig(min_kept=0.0),
        masks_per_shard=2,
    )
    return dataclasses.replace(config, **changes)


def all_rows(output):
    """Return all committed rows of all statuses."""
    return list(ShardDataset.open(str(output)).rows(statuses=STATUSES))


def digest(output):
    return rows_digest(all_rows(output))
