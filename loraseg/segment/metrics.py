"""Segmentation scores from a streamed confusion matrix, and their harmonic mean."""

import math
from collections.abc import Sequence

import numpy as np

from loraseg.errors import DatasetError, StageError
from loraseg.tensor_types import Float, Int, ndarray

__all__ = ["ConfusionMatrix", "hmean"]


class ConfusionMatrix:
    """Pixel counts by labelled and predicted class, summed over the images of a dataset.

    ``IoU_c = TP_c / (TP_c + FP_c + FN_c)``. As in detectron2's ``SemSegEvaluator`` and the scorer
    of Cityscapes:

    - pixels labelled ``ignore_index`` are not counted;
    - a prediction of ``ignore_index`` (no class) on a labelled pixel is a miss of its class;
    - the IoU of a class is NaN if it is neither labelled nor predicted in any image, and 0 if it
      is predicted but never labelled;
    - the mean IoU is taken over the classes that occur in the labels.

    Attributes:
        counts: (n, n + 1) int64; rows are labels, columns predictions, the last one "no class".

    Raises:
        DatasetError: There is no class, or ``ignore_index`` is a class id.
    """

    def __init__(self, classes: int, *, ignore_index: int = 255) -> None:
        if classes < 1 or 0 <= ignore_index < classes:
            raise DatasetError(
                f"{classes} classes with ignore_index {ignore_index}: expected at least one class "
                "and an ignore_index that is not a class id"
            )
        self.classes = classes
        self.ignore_index = ignore_index
        self.counts: Int[ndarray, "n m"] = np.zeros((classes, classes + 1), dtype=np.int64)

    def add(self, label: ndarray, pred: ndarray) -> None:
        """Count the pixels of one image or batch.

        Args:
            label: Integer class ids or ``ignore_index``, of any shape such as (h, w).
            pred: Predicted ids of the same shape.

        Raises:
            DatasetError: Shapes differ, an array is not of integers, or a counted pixel has an id
                outside the classes.
        """
        if label.shape != pred.shape:
            raise DatasetError(f"label {label.shape} and prediction {pred.shape} differ in shape")
        if not (label.dtype.kind in "iu" and pred.dtype.kind in "iu"):
            raise DatasetError(f"label {label.dtype} and prediction {pred.dtype} must be integers")
        counted = label != self.ignore_index
        rows = label[counted].astype(np.int64)
        columns = pred[counted].astype(np.int64)
        columns = np.where(columns == self.ignore_index, self.classes, columns)
        for name, ids, last in (
            ("label", rows, self.classes - 1),
            ("prediction", columns, self.classes),
        ):
            if ids.size and not 0 <= ids.min() <= ids.max() <= last:
                raise DatasetError(
                    f"{name} ids from {ids.min()} to {ids.max()}; expected 0 to "
                    f"{self.classes - 1} or {self.ignore_index}"
                )
        width = self.classes + 1
        pairs = np.bincount(rows * width + columns, minlength=self.classes * width)
        self.counts += pairs.reshape(self.classes, width)

    def merge(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        """Return the matrix of both sets of images.

        Raises:
            DatasetError: The matrices differ in classes or ignore_index.
        """
        if (self.classes, self.ignore_index) != (other.classes, other.ignore_index):
            raise DatasetError(
                f"cannot merge matrices of {self.classes} classes (ignore {self.ignore_index}) "
                f"and {other.classes} classes (ignore {other.ignore_index})"
            )
        merged = ConfusionMatrix(self.classes, ignore_index=self.ignore_index)
        merged.counts = self.counts + other.counts
        return merged

    def iou(self) -> Float[ndarray, " n"]:
        """Return the IoU of each class in [0, 1]; NaN if neither labelled nor predicted."""
        hits = np.diagonal(self.counts)
        union = self.counts.sum(axis=1) + self.counts[:, : self.classes].sum(axis=0) - hits
        return np.divide(hits, union, out=np.full(self.classes, np.nan), where=union > 0)

    def miou(self) -> float:
        """Return the mean IoU in [0, 1] over the classes that occur in the labels.

        Raises:
            StageError: No labelled pixel has been counted.
        """
        return float(self.iou()[self._classes_present()].mean())

    def pixel_accuracy(self) -> float:
        """Return the share of labelled pixels with the right prediction, in [0, 1].

        Raises:
            StageError: No labelled pixel has been counted.
        """
        self._classes_present()
        return float(np.trace(self.counts) / self.counts.sum())

    def _classes_present(self) -> Int[ndarray, " k"]:
        """Return the ids of the classes that occur in the labels."""
        present = np.flatnonzero(self.counts.sum(axis=1))
        if not present.size:
            raise StageError("no labelled pixel was counted, so there is no score")
        return present


def hmean(values: Sequence[float]) -> float:
    """Return the harmonic mean ``n / sum(1 / x)``; 0 if any value is 0.

    SemLA (arXiv 2503.21780) reports it over its 20 domains as "h-mean".

    Args:
        values: Non-negative scores; the result has their unit.

    Raises:
        StageError: There are no values, or one is NaN, infinite or negative.
    """
    invalid = [value for value in values if not (math.isfinite(value) and value >= 0)]
    if invalid or not values:
        raise StageError(f"a harmonic mean needs finite scores >= 0, got {list(values)}")
    if min(values) == 0:
        return 0.0
    # Scaled by the smallest score: 1 / x of a denormal x would be infinite.
    smallest = min(values)
    return len(values) * smallest / math.fsum(smallest / value for value in values)
