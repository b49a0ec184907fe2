"""Filters for the labels of generated images: relative, confidence and FreeMask.

A filter keeps the class of the mask at a pixel or marks the pixel as ignored; none writes another
class. With the mask SM, the segmenter's pseudo-label PM_k and class probabilities p_k of image k,
a pixel keeps its label where

* ``relative``: PM_k = majority vote of PM_1..PM_K (MatchMask, CVPR 2026, "Relative Filtering");
* ``confidence``: max_c p_k(c) >= threshold (the common baseline, compared in MatchMask);
* ``freemask``: -log p_k(SM) <= tolerance * mean loss of class SM on real images (FreeMask, arXiv
  2310.15160; in its code ``preprocess/filter.py``, where the tolerance is 1.25).

Difference from the papers: an image that keeps less than ``min_kept`` of its labels is dropped.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from loraseg.errors import ConfigError, DatasetError
from loraseg.synth.majority_vote import (
    TieBreak,
    ignore_value,
    relative_filter,
    write_filtered_labels,
)
from loraseg.tensor_types import Bool, Float, Int, UInt, ndarray

__all__ = ["FilterConfig", "FilterMethod", "FilteredLabels", "PseudoLabels", "apply_filter"]

FilterMethod = Literal["none", "confidence", "freemask", "relative"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig:
    """Settings of the label filter.

    Attributes:
        method: Where a pixel keeps its label. ``relative``: the segmenter predicts the class that
            it predicts for most images of the mask; ``confidence``: its highest probability is at
            least ``threshold``; ``freemask``: the cross-entropy of the mask's class is at most
            ``tolerance`` times the mean of that class on real images; ``none``: everywhere.
        ties: Tie rule of ``relative``, see :func:`~loraseg.synth.majority_vote.majority_vote`.
        threshold: For ``confidence``, 0 to 1.
        tolerance: For ``freemask``, above 0.
        min_kept: Images that keep a smaller share of their labels, 0 to 1, are dropped.

    Raises:
        ConfigError: A value is out of range.
    """

    method: FilterMethod = "relative"
    ties: TieBreak = "mask_first"
    threshold: float = 0.9
    tolerance: float = 1.25
    min_kept: float = 0.3

    def __post_init__(self) -> None:
        for name in ("threshold", "min_kept"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected 0 to 1")
        if not 0 < self.tolerance < float("inf"):
            raise ConfigError(f"tolerance: got {self.tolerance}, expected a finite number above 0")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PseudoLabels:
    """A segmenter's predictions for the k images of one mask.

    Attributes:
        labels: (k, h, w) uint8 or uint16, the predicted class of each pixel; never the ignore
            value.
        confidence: (k, h, w) probability of that class, in [0, 1]; for ``confidence``.
        loss: (k, h, w) minus the logarithm of the probability of the mask's class, arbitrary where
            the mask has no label; for ``freemask``.
    """

    labels: ndarray
    confidence: ndarray | None = None
    loss: ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FilteredLabels:
    """The labels of the k images of one mask.

    Attributes:
        labels: The class of the mask, or the ignore value (255 in uint8, 65,535 in uint16).
        kept: Share of the mask's labelled pixels that kept their label, in [0, 1].
        kept_by_class: The same for each class; NaN for classes that the mask does not contain.
        dropped: True where ``kept`` is below ``min_kept``.
    """

    labels: UInt[ndarray, "k h w"]
    kept: Float[ndarray, " k"]
    kept_by_class: Float[ndarray, "k classes"]
    dropped: Bool[ndarray, " k"]


def apply_filter(
    mask: ndarray,
    pseudo_labels: PseudoLabels,
    config: FilterConfig,
    classes: int,
    *,
    class_loss: Float[ndarray, " classes"] | None = None,
) -> FilteredLabels:
    """Filter the labels of the images of one mask.

    Args:
        mask: (h, w) uint8 or uint16 class ids; ignored pixels stay ignored.
        pseudo_labels: Predictions (k, h, w) for images of that mask, in the same dtype of ids.
        config: The filter.
        classes: Number of classes, at most 255 for uint8 and 65,535 for uint16.
        class_loss: (classes,) for ``freemask``, see
            :func:`~loraseg.synth.freemask.class_mean_loss`; a class with NaN keeps no pixel.

    Raises:
        DatasetError: The mask or the pseudo-labels have another dtype or shape or contain an
            unknown id, the mask has no label, or there are more than 256 images.
        ConfigError: ``relative`` with a single image, a map that the filter needs is missing, or
            ``class_loss`` is not one number per class.
    """
    if class_loss is not None and class_loss.shape != (classes,):
        raise ConfigError(f"class_loss: got {class_loss.shape}, expected ({classes},)")
    totals = _count_class_pixels(mask, classes)
    _check_labels(mask, pseudo_labels.labels, classes)
    labels = _filter_labels(mask, pseudo_labels, config, class_loss)
    areas = np.stack([_count_pixels(image_labels)[:classes] for image_labels in labels])
    by_class = np.full(areas.shape, np.nan)
    np.divide(areas, totals, out=by_class, where=totals > 0)
    kept = areas.sum(axis=1) / totals.sum()
    return FilteredLabels(
        labels=labels, kept=kept, kept_by_class=by_class, dropped=kept < config.min_kept
    )


def _filter_labels(
    mask: ndarray, pseudo_labels: PseudoLabels, config: FilterConfig, class_loss: ndarray | None
) -> UInt[ndarray, "k h w"]:
    shape = pseudo_labels.labels.shape
    if config.method == "relative":
        if len(pseudo_labels.labels) < 2:
            raise ConfigError(
                "relative filtering: got 1 image of a mask, expected at least 2, as an image "
                "always agrees with itself; generate more or choose another filter"
            )
        return relative_filter(mask, pseudo_labels.labels, ties=config.ties)
    # Negated comparisons: NaN compares as False, so that its pixel is not kept.
    if config.method == "confidence":
        differs = ~(
            _require_values("confidence", pseudo_labels.confidence, shape) >= config.threshold
        )
    elif config.method == "freemask":
        limits = _max_loss(mask, class_loss, config.tolerance)
        differs = ~(_require_values("loss", pseudo_labels.loss, shape) <= limits)
    else:
        differs = np.zeros(shape, dtype=bool)
    out = np.empty(shape, dtype=mask.dtype)
    write_filtered_labels(mask, differs, out)
    return out


def _max_loss(mask: ndarray, class_loss: ndarray | None, tolerance: float) -> Float[ndarray, "h w"]:
    """Return the highest loss at which each pixel keeps its label."""
    if class_loss is None:
        raise ConfigError("freemask: expected the mean loss of each class on real images")
    table = np.full(ignore_value(mask.dtype) + 1, np.nan)
    table[: len(class_loss)] = tolerance * class_loss
    return table[mask]


def _require_values(name: str, values: ndarray | None, shape: tuple[int, ...]) -> ndarray:
    if values is None:
        raise ConfigError(f"label filter: got no {name} of each pixel")
    if values.shape != shape:
        raise DatasetError(f"{name}: got {values.shape}, expected {shape} like the labels")
    return values


def _count_class_pixels(mask: ndarray, classes: int) -> Int[ndarray, " classes"]:
    """Check a mask; return the number of pixels of each class."""
    ignore = ignore_value(mask.dtype)
    if not 1 <= classes <= ignore:
        raise DatasetError(f"classes: got {classes}, expected 1 to {ignore} in {mask.dtype} maps")
    if mask.ndim != 2:
        raise DatasetError(f"mask: got {mask.shape}, expected (h, w)")
    areas = _count_pixels(mask)
    unknown = np.flatnonzero(areas[classes:ignore]) + classes
    if len(unknown):
        raise DatasetError(
            f"mask: got class ids {unknown[:8].tolist()}, expected 0 to {classes - 1} or {ignore}"
        )
    if not areas[:classes].any():
        raise DatasetError("mask: every pixel is ignored, expected at least one label")
    return areas[:classes]


def _check_labels(mask: ndarray, labels: ndarray, classes: int) -> None:
    if labels.dtype != mask.dtype or labels.ndim != 3 or labels.shape[1:] != mask.shape:
        raise DatasetError(
            f"pseudo-labels: got {labels.dtype} {labels.shape}, expected {mask.dtype} (k, h, w) "
            f"with {mask.shape} pixels"
        )
    if not len(labels) or labels.max() >= classes:
        raise DatasetError(
            f"pseudo-labels: got {len(labels)} maps with ids up to "
            f"{labels.max(initial=0)}, expected ids 0 to {classes - 1} at every pixel"
        )


def _count_pixels(ids: UInt[ndarray, "h w"]) -> Int[ndarray, " ids"]:
    return np.bincount(ids.reshape(-1), minlength=ignore_value(ids.dtype) + 1)
