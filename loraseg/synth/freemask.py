"""FreeMask's statistics: how hard a class is on real images, and what follows (methods b.5).

As in the authors' code, where the paper leaves details open.
"""

from collections.abc import Iterable

import numpy as np

from loraseg.errors import ConfigError, DatasetError
from loraseg.synth.plurality import ignore_value
from loraseg.tensor_types import Float, Int, UInt, ndarray

__all__ = ["class_mean_loss", "freemask_counts", "mask_hardness"]


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


def mask_hardness(mask: UInt[ndarray, "h w"], class_loss: Float[ndarray, " classes"]) -> float:
    """Return the mean over a mask's labelled pixels of the loss of their class.

    Args:
        mask: Class ids below the number of classes, or the ignore value.
        class_loss: See :func:`class_mean_loss`; NaN counts as zero.
    """
    labelled = mask[mask != ignore_value(mask.dtype)]
    return float(np.nan_to_num(class_loss)[labelled].mean()) if labelled.size else 0.0


def freemask_counts(hardness: Float[ndarray, " n"], *, limit: int = 20) -> Int[ndarray, " n"]:
    """Return how many images each mask gets, more for harder ones.

    That is min(1 + round(limit · rank / n), limit), with rank 1 for the easiest of the n masks. Of
    equally hard masks the earlier is the easier; a half is rounded to the even number.

    Args:
        hardness: See :func:`mask_hardness`.
        limit: Images of the hardest.

    Raises:
        ConfigError: ``limit`` is below 1.
    """
    if limit < 1:
        raise ConfigError(f"limit: got {limit}, expected at least 1")
    count = len(hardness)
    ranks = np.empty(count, dtype=np.int64)
    ranks[np.argsort(hardness, kind="stable")] = np.arange(1, count + 1)
    return np.minimum(1 + np.round(limit * (ranks / max(count, 1))).astype(np.int64), limit)
