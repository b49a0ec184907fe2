"""FreeMask's statistics: how hard a class is on real images (methods b.5)."""

from collections.abc import Iterable

import numpy as np

from loraseg.errors import DatasetError
from loraseg.synth.majority_vote import ignore_value
from loraseg.tensor_types import Float, ndarray

__all__ = ["class_mean_loss"]


def class_mean_loss(
    pairs: Iterable[tuple[ndarray, ndarray]], classes: int
) -> Float[ndarray, " classes"]:
    """Return the mean cross-entropy of each class over the pixels of real images.

    Args:
        pairs: (mask, loss) of each image, taken one by one: (h, w) uint8 or uint16 class ids, and
            the cross-entropy of its class at each pixel. Pixels without a label are left out.
        classes: Number of classes.

    Returns:
        float64; NaN for a class that no image has.

    Raises:
        DatasetError: A mask and its loss have different shapes, or a mask holds other ids.
    """
    sums, pixels = np.zeros(classes), np.zeros(classes)
    for number, (mask, loss) in enumerate(pairs):
        if mask.shape != loss.shape:
            raise DatasetError(
                f"real image {number}: got a mask of {mask.shape} and a loss of {loss.shape}"
            )
        labelled = mask != ignore_value(mask.dtype)
        ids = mask[labelled]
        if ids.size and ids.max() >= classes:
            raise DatasetError(
                f"real image {number}: got class id {ids.max()}, expected 0 to {classes - 1}"
            )
        sums += np.bincount(ids, weights=loss[labelled], minlength=classes)
        pixels += np.bincount(ids, minlength=classes)
    return np.divide(sums, pixels, out=np.full(classes, np.nan), where=pixels > 0)
