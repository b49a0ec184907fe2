"""Lineage of synthetic pairs: everything needed to reproduce a pair, and its identifier."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loraseg.storage.json_io import canonical_json
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["Lineage", "LineageAdapter", "generator_digest", "mask_digest", "pair_id"]


@dataclass(frozen=True, slots=True)
class LineageAdapter:
    """An adapter that was in use: its name, the sha256 of its files and its weight."""

    name: str
    digest: str
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """The origin of one image and its label.

    Attributes:
        pair_id: See :func:`pair_id`.
        mask_id: See :func:`mask_digest`; with ``k`` and the seed of the job it determines the
            noise.
        k: Index of the image among those of its mask, from 0.
        seed: Seed of the image's noise.
        prompt: The prompt.
        dropped: Classes that did not fit into the prompt; their pixels are 255 in the label.
        size: Height and width of image and label, pixels.
        base: Name and sha256 of the text-to-image model.
        generator: See :func:`generator_digest`.
        adapters: Adapters used for all images.
        heads: Further adapters with the weights of this image.
        sampling: The sampling config as JSON values.
        conditioning: The conditioning config as JSON values.
        code_revision: Revision of the code.
    """

    pair_id: str
    mask_id: str
    k: int
    seed: int
    prompt: str
    dropped: tuple[str, ...]
    size: tuple[int, int]
    base: Mapping[str, str]
    generator: str
    adapters: tuple[LineageAdapter, ...]
    heads: tuple[LineageAdapter, ...]
    sampling: Mapping[str, Any]
    conditioning: Mapping[str, Any]
    code_revision: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))


def mask_digest(mask: UInt8[ndarray, "h w"]) -> str:
    """Return the sha256 (hex) of a mask's ids and shape, independent of its file's encoding."""
    digest = hashlib.sha256(json.dumps(["mask", *mask.shape]).encode())
    digest.update(np.ascontiguousarray(mask).tobytes())
    return digest.hexdigest()


def pair_id(mask: str, k: int, generator: str, seed: int, heads: Sequence[float] = ()) -> str:
    """Return the identifier of a pair, a digest of its inputs: a repeated job gives the same one.

    Args:
        mask: Digest of the mask.
        k: Index of the image among those of the mask.
        generator: Digest of the generator.
        seed: Seed of the job.
        heads: Weights of the heads for this image.
    """
    return _digest(["pair", mask, k, generator, seed, *([list(heads)] if heads else [])])


def generator_digest(parts: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of everything that, with a mask and a seed, determines an image.

    Args:
        parts: Digests, weights and settings as JSON values; their order does not matter.
    """
    return _digest(["generator", dict(parts)])


def _digest(values: Any) -> str:
    # JSON writes the shortest exact form of a float, so nearly equal weights stay distinct.
    return hashlib.sha256(canonical_json(values)).hexdigest()
