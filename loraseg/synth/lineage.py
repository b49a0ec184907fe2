"""Where a synthetic pair comes from: enough to make it again, and to tell it from all others."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loraseg.tensor_types import UInt8, ndarray

__all__ = ["Lineage", "LineageAdapter", "generator_digest", "mask_digest", "pair_id"]


@dataclass(frozen=True, slots=True)
class LineageAdapter:
    """An adapter that acted: its name, the sha256 of its files and its weight."""

    name: str
    digest: str
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """One image and its label.

    Attributes:
        pair_id: See :func:`pair_id`.
        mask_id: See :func:`mask_digest`; with ``k`` and the job's seed it decides the noise.
        k: Which of the images of this mask, from 0.
        seed: Of this image's noise.
        prompt: What the text encoders read.
        dropped: Classes that had no room in the prompt; their pixels are 255 in the label.
        size: Height and width of the image and the label.
        base: Name and sha256 of the text-to-image model.
        generator: See :func:`generator_digest`.
        adapters: What acted on all images.
        heads: What acted on this image beside them.
        sampling: The sampling config as JSON values.
        conditioning: The conditioning config as JSON values.
        code_revision: Which code made it.
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
        """Return plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def mask_digest(mask: UInt8[ndarray, "h w"]) -> str:
    """Return the sha256 (hex) of a mask's ids and shape; how its file was written is no matter."""
    digest = hashlib.sha256(json.dumps(["mask", *mask.shape]).encode())
    digest.update(np.ascontiguousarray(mask).tobytes())
    return digest.hexdigest()


def pair_id(mask: str, k: int, generator: str, seed: int, heads: Sequence[float] = ()) -> str:
    """Name a pair by what it is made of, so that running a job again gives the same names.

    Args:
        mask: Its digest.
        k: Which image of the mask.
        generator: Its digest.
        seed: The job's.
        heads: Weights of the heads for this image.
    """
    return _digest(["pair", mask, k, generator, seed, *([list(heads)] if heads else [])])


def generator_digest(parts: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of all that decides what a mask and a seed become.

    Args:
        parts: Digests, weights and settings as JSON values; their order is no matter.
    """
    return _digest(["generator", dict(parts)])


def _digest(values: Any) -> str:
    # repr of a float is its shortest exact form, and so is JSON's: nearly equal weights keep apart.
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
