"""Segmentation scores from a streamed confusion matrix, and their harmonic mean."""

import math
from collections.abc import Sequence

import numpy as np

from loraseg.errors import DatasetError, StageError
from loraseg.tensor_types import Float, Int, ndarray

__all__ = ["ConfusionMatrix", "hmean"]


class ConfusionMatrix:
    """Pixel counts by labelled and predicted class, summed over all images of a data set.

    Policy, as in the scorers of the benchmarks (methods B.6):

    - pixels labelled ``ignore_index`` count nowhere;
    - a prediction of ``ignore_index`` (no class) on a labelled pixel is a miss of its class;
    - the IoU of a class is nan if it is neither labelled nor predicted anywhere, and 0 if it is
      predicted but never labelled;
    - the mean IoU runs over the classes that occur in the labels, and over no other.

    Attributes:
        counts: (n, n + 1) int64; rows are labels, columns predictions, the last one "no class".
    """

    def __init__(self, classes: int, *, ignore_index: int = 255) -> None:
        if classes < 1 or 0 <= ignore_index < classes:
            raise DatasetError(
                f"{classes} classes with ignore_index {ignore_index}: expected at least one class "
                "and an ignore_index outside of them"
            )
        self.classes = classes
        self.ignore_index = ignore_index
        self.counts: Int[ndarray, "n m"] = np.zeros((classes, classes + 1), dtype=np.int64)

    def add(self, label: ndarray, pred: ndarray) -> None:
        """Count the pixels of one image or batch: two arrays of class ids, of one shape.

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
        for what, ids, last in (
            ("label", rows, self.classes - 1),
            ("prediction", columns, self.classes),
        ):
            if ids.size and not 0 <= ids.min() <= ids.max() <= last:
                raise DatasetError(
                    f"{what} ids from {ids.min()} to {ids.max()}; expected 0 to "
                    f"{self.classes - 1} or {self.ignore_index}"
                )
        width = self.classes + 1
        pairs = np.bincount(rows * width + columns, minlength=self.classes * width)
        self.counts += pairs.reshape(self.classes, width)

    def merge(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        """Return the matrix of both sets of images together.

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
        """Return the IoU of each class in [0, 1]; nan where neither labelled nor predicted."""
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
        """Return the share of labelled pixels that are predicted right.

        Raises:
            StageError: No labelled pixel has been counted.
        """
        self._classes_present()
        return float(np.trace(self.counts) / self.counts.sum())

    def _classes_present(self) -> Int[ndarray, " k"]:
        """Return the ids of the classes that occur in the labels."""
        present = np.flatnonzero(self.counts.sum(axis=1))
        if not present.size:
            raise StageError("no labelled pixel was counted: there is nothing to score")
        return present


def hmean(values: Sequence[float]) -> float:
    """Return the harmonic mean n / sum(1 / x), and 0 if any value is 0 (methods B.6).

    Args:
        values: Scores, none negative; the unit is kept.

    Raises:
        StageError: There is no value, or one is nan, infinite or negative.
    """
    wrong = [value for value in values if not (math.isfinite(value) and value >= 0)]
    if wrong or not values:
        raise StageError(f"a harmonic mean needs finite scores >= 0, got {list(values)}")
    if min(values) == 0:
        return 0.0
    # Divided by the smallest score first: 1 / x of a denormal x would be infinite.
    least = min(values)
    return len(values) * least / math.fsum(least / value for value in values)
