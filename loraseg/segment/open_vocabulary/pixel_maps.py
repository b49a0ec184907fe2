"""Reduction of score maps to per-pixel class, confidence and entropy."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraseg.errors import ConfigError
from loraseg.tensor_types import Float, ndarray

__all__ = ["MAPS", "PixelMaps", "check_maps", "empty_maps", "label_map", "pixel_maps"]

MAPS = ("confidence", "entropy")
# Scores per block of the entropy, whose two temporaries then stay in the cache.
_BLOCK_SCORES = 2**18


@dataclass(frozen=True, slots=True)
class PixelMaps:
    """Per-pixel results of an image.

    Attributes:
        label_map: Class index of each pixel (h, w): uint8 for up to 255 classes, else int32.
        confidence: Score of that class, float32 (h, w) in [0, 1]; None if not requested.
        entropy: Entropy of the scores normalised to sum 1, divided by log(classes): float32 (h, w)
            in [0, 1], 0 with a single class; None if not requested.
    """

    label_map: ndarray
    confidence: ndarray | None = None
    entropy: ndarray | None = None


def pixel_maps(scores: Float[Tensor, "t h w"], maps: Collection[str] = ()) -> PixelMaps:
    """Reduce score maps to the label map and the requested maps.

    Args:
        scores: In [0, 1], float32.
        maps: Names from ``MAPS``.

    Raises:
        ConfigError: A name is not in ``MAPS``.
    """
    check_maps(maps)
    return PixelMaps(
        label_map=label_map(scores),
        confidence=scores.amax(dim=0).cpu().numpy() if "confidence" in maps else None,
        entropy=_entropy(scores) if "entropy" in maps else None,
    )


def empty_maps(height: int, width: int, classes: int, maps: Collection[str]) -> PixelMaps:
    """Return uninitialised maps (h, w), to be filled block by block.

    Raises:
        ConfigError: A name is not in ``MAPS``.
    """
    check_maps(maps)
    confidence, entropy = (
        np.empty((height, width), np.float32) if name in maps else None for name in MAPS
    )
    return PixelMaps(np.empty((height, width), _label_type(classes)), confidence, entropy)


def check_maps(maps: Collection[str]) -> None:
    """Check the names of maps.

    Raises:
        ConfigError: A name is not in ``MAPS``.
    """
    unknown = sorted(set(maps) - set(MAPS))
    if unknown:
        raise ConfigError(f"maps: got {unknown}, expected some of {list(MAPS)}")


def label_map(scores: Float[Tensor, "t h w"]) -> ndarray:
    """Return the class (h, w) with the largest score of each pixel; the first class on ties."""
    # numpy's argmax returns the first of equal values; torch does not define which.
    labels = scores.cpu().numpy().argmax(axis=0)
    return labels.astype(_label_type(scores.shape[0]))


def _label_type(classes: int) -> type[np.uint8 | np.int32]:
    return np.uint8 if classes <= 255 else np.int32


def _entropy(scores: Float[Tensor, "t h w"]) -> ndarray:
    classes, height, width = scores.shape
    entropy = np.zeros((height, width), np.float32)
    if classes == 1:
        return entropy
    rows = max(1, _BLOCK_SCORES // (classes * width))
    for top in range(0, height, rows):
        block = _entropy_block(scores[:, top : top + rows].float())
        entropy[top : top + rows] = block.cpu().numpy()
    return entropy


def _entropy_block(scores: Float[Tensor, "t h w"]) -> Float[Tensor, "h w"]:
    """Return ``(log S - sum(s log s) / S) / log t`` with ``S = sum(s)``."""
    largest = scores.amax(dim=0)
    # The result depends on ratios only; ratios to the largest score neither over- nor underflow.
    ratios = torch.where(largest > 0, scores / largest, 1.0)
    total = ratios.sum(dim=0)
    mean = torch.xlogy(ratios, ratios).sum(dim=0).div_(total)
    return total.log_().sub_(mean).div_(math.log(len(scores))).clamp_(0, 1)
