"""Measures that the studies share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from loraseg.tensor_types import UInt8, ndarray

__all__ = ["LabelPrecision", "mean_and_deviation"]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return mean and sample standard deviation of shares in percent; empty without values."""
    if not values:
        return ""
    mean = f"{100 * float(np.mean(values)):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * float(np.std(values, ddof=1)):.1f}"


class LabelPrecision:
    """Counts the labels that a filter keeps, and those that the judge confirms, by class."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self._mask_pixels = np.zeros(256, np.int64)
        self._kept_pixels = np.zeros(256, np.int64)
        self._correct_pixels = np.zeros(256, np.int64)

    def add(
        self,
        label: UInt8[ndarray, "h w"],
        judged: UInt8[ndarray, "h w"],
        mask: UInt8[ndarray, "h w"],
    ) -> None:
        """Add an image.

        Args:
            label: Filtered label map, 255 = removed or ignored.
            judged: Label map of the judge.
            mask: Mask from which the image was generated.
        """
        self._mask_pixels += np.bincount(mask.reshape(-1), minlength=256)
        self._kept_pixels += np.bincount(label.reshape(-1), minlength=256)
        self._correct_pixels += np.bincount(label[label == judged].reshape(-1), minlength=256)

    def to_json(self) -> dict[str, Any]:
        """Return precision, share of kept labels, and precision by class (None without labels)."""
        count = len(self._classes)
        kept, correct = self._kept_pixels[:count], self._correct_pixels[:count]
        shares = np.divide(correct, kept, out=np.full(count, np.nan), where=kept > 0)
        return {
            "precision": round(float(correct.sum() / max(kept.sum(), 1)), 4),
            "kept": round(float(kept.sum() / self._mask_pixels[:count].sum()), 4),
            "precision_by_class": {
                name: None if np.isnan(share) else round(float(share), 3)
                for name, share in zip(self._classes, shares, strict=True)
            },
        }
