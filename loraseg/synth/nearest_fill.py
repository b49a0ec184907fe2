"""Filling of ignored pixels with the nearest class."""

import numpy as np

from loraseg.data.labels import IGNORE
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["fill_ignored"]


def fill_ignored(mask: UInt8[ndarray, "h w"]) -> UInt8[ndarray, "h w"]:
    """Give every ignored pixel (255) the class of the nearest labelled one.

    Nearest in exact Euclidean distance between pixel centres; of several equally near pixels the
    smallest class id wins. A mask without any labelled pixel comes back as it is. The cost grows
    with the ignored pixels times their distance to the nearest label.
    """
    holes = np.argwhere(mask == IGNORE)
    if len(holes) in (0, mask.size):
        return mask.copy()
    keys = _column_keys(mask)
    width = mask.shape[1]
    rows, columns = holes.T
    best = keys[rows, columns]
    # Key = squared distance * 256 + class, so that the least key also settles ties. Columns
    # further away than the best distance so far cannot win, nor tie.
    active = np.arange(len(holes))
    for step in range(1, width):
        active = active[best[active] >> 8 >= step * step]
        if not len(active):
            break
        for column in (columns[active] - step, columns[active] + step):
            inside = (column >= 0) & (column < width)
            chosen = active[inside]
            offered = keys[rows[chosen], column[inside]] + (step * step << 8)
            best[chosen] = np.minimum(best[chosen], offered)
    filled = mask.copy()
    filled[rows, columns] = (best & 0xFF).astype(np.uint8)
    return filled


def _column_keys(mask: UInt8[ndarray, "h w"]) -> ndarray:
    """Return the least key (h, w) among the labelled pixels of each pixel's own column."""
    height, width = mask.shape
    rows = np.arange(height)[:, None]
    labelled = mask != IGNORE
    # Farther than any pixel of the mask, for columns without a label.
    far = height + width
    above = np.maximum.accumulate(np.where(labelled, rows, -far), axis=0)
    below = np.minimum.accumulate(np.where(labelled, rows, height + far)[::-1], axis=0)[::-1]
    columns = np.broadcast_to(np.arange(width), mask.shape)
    found = [
        (((row - rows).astype(np.int64) ** 2) << 8) + mask[np.clip(row, 0, height - 1), columns]
        for row in (above, below)
    ]
    return np.minimum(*found)
