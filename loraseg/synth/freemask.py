"""Mean loss of each class on real images, for FreeMask's label filter.

FreeMask (arXiv 2310.15160), filtering of noisy synthetic regions; in its code
``preprocess/filter.py`` (``class_wise_mean_loss``).
"""

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
        pairs: (mask, loss) of each image: (h, w) uint8 or uint16 class ids, and (h, w) the
            cross-entropy of the labelled class at each pixel. Ignored pixels are left out.
        classes: Number of classes.

    Returns:
        (classes,) float64; NaN for a class that no image contains.

    Raises:
        DatasetError: A mask and its loss differ in shape, or a mask contains an unknown id.
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
