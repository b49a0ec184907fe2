"""Masks as run lengths in COCO's compressed format (``rleToString`` of pycocotools), per class.

Runs are in column-major order; the first is outside the mask. From the fourth on, a run is stored
as the difference to the run two before it. Numbers are split into groups of five bits, lowest
first; a group is the character 48 + bits, plus 32 if another group follows.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from loraseg.errors import DatasetError
from loraseg.image_limits import MAX_PIXELS
from loraseg.tensor_types import Bool, ndarray

__all__ = ["decode_rle", "encode_rle"]

_GROUP_BITS, _CHAR_OFFSET, _CONTINUATION_BIT = 5, 48, 0x20
# Differences of runs below 2**26 need 6 groups with their sign.
_MAX_GROUPS = 7


def encode_rle(label_map: ndarray, class_ids: Iterable[int]) -> list[dict[str, Any]]:
    """Encode the masks of classes.

    Args:
        label_map: Integer class ids (h, w).
        class_ids: Which classes; those without a pixel are left out.

    Returns:
        JSON values, in the order of ``class_ids``: ``class_id``, ``size`` [h, w], ``counts`` and
        ``area`` in pixels. ``size`` and ``counts`` are what pycocotools gives and takes.
    """
    height, width = label_map.shape
    flat = label_map.T.reshape(-1)
    if not flat.size:
        return []
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.concatenate([starts[1:], [flat.size]])
    labels = flat[starts]
    order = np.argsort(labels, kind="stable")
    found: list[dict[str, Any]] = []
    for class_id in class_ids:
        low, high = np.searchsorted(labels, [class_id, class_id + 1], sorter=order)
        if low == high:
            continue
        runs = order[low:high]
        bounds = np.stack([starts[runs], ends[runs]], axis=1).reshape(-1)
        # A mask that holds the last pixel has no run of others behind it.
        rest = bounds[:0] if bounds[-1] == flat.size else flat.size
        counts = np.diff(bounds, prepend=0, append=rest)
        found.append(
            {
                "class_id": int(class_id),
                "size": [height, width],
                "counts": _encode_counts(counts),
                "area": int(counts[1::2].sum()),
            }
        )
    return found


def decode_rle(rle: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS) -> Bool[ndarray, "h w"]:
    """Return the mask of what :func:`encode_rle` or pycocotools wrote.

    Args:
        rle: ``size`` and ``counts`` (str or bytes); ``area`` is checked if it is there.
        max_pixels: Larger masks are refused before memory is taken for them.

    Raises:
        DatasetError: It is not such a mask, or its runs do not add up to its size.
    """
    height, width = _parse_size(rle.get("size"), max_pixels)
    counts = _decode_counts(rle.get("counts"), height * width)
    if int(counts.min()) < 0 or int(counts.max()) > height * width:
        raise DatasetError(f"rle: counts: a run outside 0 to {height * width} pixels")
    total = int(counts.sum())
    if total != height * width:
        raise DatasetError(f"rle: counts add up to {total} pixels, expected {height} x {width}")
    area = rle.get("area")
    if area is not None and area != int(counts[1::2].sum()):
        raise DatasetError(f"rle: area {area!r}, but counts give {int(counts[1::2].sum())}")
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(width, height).T


def _encode_counts(counts: ndarray) -> str:
    values = counts.astype(np.int64)
    values[3:] -= counts[1:-2]
    groups: list[ndarray] = []
    used: list[ndarray] = []
    more = np.ones(len(values), bool)
    while more.any():
        used.append(more)
        group = values & 0x1F
        values = values >> _GROUP_BITS
        # The last group's highest bit is the sign.
        more = more & (values != np.where(group & 0x10, -1, 0))
        groups.append(group + _CHAR_OFFSET + np.where(more, _CONTINUATION_BIT, 0))
    characters = np.stack(groups, axis=1)[np.stack(used, axis=1)]
    return characters.astype(np.uint8).tobytes().decode("ascii")


def _parse_size(size: Any, max_pixels: int) -> tuple[int, int]:
    sides = list(size) if isinstance(size, list | tuple) else []
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise DatasetError(f"rle: size: got {str(size)[:60]}, expected [height, width]")
    height, width = sides
    if height * width > max_pixels:
        raise DatasetError(f"rle: size: {height} x {width}; at most {max_pixels} pixels are read")
    return height, width


def _decode_counts(counts: Any, pixels: int) -> ndarray:
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    # Runs may be empty, but a mask has no use for more of them than two a pixel.
    if not isinstance(counts, bytes) or not 0 < len(counts) <= _MAX_GROUPS * 2 * (pixels + 1):
        raise DatasetError("rle: counts: expected the compressed dialect of COCO as a string")
    characters = np.frombuffer(counts, np.uint8).astype(np.int64) - _CHAR_OFFSET
    last = characters & _CONTINUATION_BIT == 0
    if characters.min() < 0 or characters.max() > 2 * _CONTINUATION_BIT - 1 or not last[-1]:
        raise DatasetError("rle: counts: a character of no number, or a number that is cut off")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_GROUPS:
        raise DatasetError(f"rle: counts: a number of over {_MAX_GROUPS * _GROUP_BITS} bits")
    places = np.arange(len(characters)) - np.repeat(starts, lengths)
    values = np.add.reduceat((characters & 0x1F) << (_GROUP_BITS * places), starts)
    negative = characters[ends] & 0x10 != 0
    values -= np.where(negative, 1 << (_GROUP_BITS * lengths), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
