"""Fill ignored pixels with the nearest class."""

import numpy as np

from loraseg.data.labels import IGNORE
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["fill_ignored"]


def fill_ignored(mask: UInt8[ndarray, "h w"]) -> UInt8[ndarray, "h w"]:
    """Give every ignored pixel (255) the class of the nearest labelled pixel.

    The distance is Euclidean between pixel centres, computed exactly; of several pixels at the
    same distance the smallest class id wins. A mask without a labelled pixel is returned unchanged
    (as a copy). The cost grows with the number of ignored pixels times their distance to the
    nearest label.
    """
    holes = np.argwhere(mask == IGNORE)
    if len(holes) in (0, mask.size):
        return mask.copy()
    keys = _column_keys(mask)
    width = mask.shape[1]
    rows, columns = holes.T
    best = keys[rows, columns]
    # Key = squared distance * 256 + class, so that the smallest key also decides ties. Columns
    # farther away than the best distance so far can neither win nor tie.
    active = np.arange(len(holes))
    for step in range(1, width):
        active = active[best[active] >> 8 >= step * step]
        if not len(active):
            break
        for column in (columns[active] - step, columns[active] + step):
            inside = (column >= 0) & (column < width)
            pixels = active[inside]
            candidates = keys[rows[pixels], column[inside]] + (step * step << 8)
            best[pixels] = np.minimum(best[pixels], candidates)
    filled = mask.copy()
    filled[rows, columns] = (best & 0xFF).astype(np.uint8)
    return filled


def _column_keys(mask: UInt8[ndarray, "h w"]) -> ndarray:
    """Return the smallest key (h, w) among the labelled pixels in the column of each pixel."""
    height, width = mask.shape
    rows = np.arange(height)[:, None]
    labelled = mask != IGNORE
    # Farther away than any pixel of the mask, for columns without a label.
    far = height + width
    above = np.maximum.accumulate(np.where(labelled, rows, -far), axis=0)
    below = np.minimum.accumulate(np.where(labelled, rows, height + far)[::-1], axis=0)[::-1]
    columns = np.broadcast_to(np.arange(width), mask.shape)
    keys = [
        (((row - rows).astype(np.int64) ** 2) << 8) + mask[np.clip(row, 0, height - 1), columns]
        for row in (above, below)
    ]
    return np.minimum(*keys)
