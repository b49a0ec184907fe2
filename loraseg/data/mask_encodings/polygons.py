"""Exact outlines of classes along the edges of pixels, with holes.

Only corners are looked for, in all classes at once: a pixel of a class is a convex corner of it
where both neighbours at a lattice point are of others, a concave one where it alone is of another.
Corners joined two by two along rows, and two by two along columns, are the outlines (this is how
layout tools turn bitmaps into polygons); they keep the class to the right of their direction.

Regions are connected over edges, not over points. An outline that touches itself in a point is cut
there, so that exteriors and holes are simple, as the OGC's Simple Features have it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraseg.errors import DatasetError
from loraseg.tensor_types import ndarray

__all__ = ["MAX_POINTS", "outline_polygons"]

# About 5 MB of JSON. A smooth label map of 1024 x 1024 pixels has less than 100,000.
MAX_POINTS = 500_000
_BLOCK_PIXELS = 2**18  # pixels that are searched for corners at once
_NO_CLASS = -1


def outline_polygons(
    label_map: ndarray, class_ids: Collection[int], *, max_points: int = MAX_POINTS
) -> list[dict[str, Any]]:
    """Turn classes into polygons; filling them by the even-odd rule gives their masks back.

    Args:
        label_map: Integer class ids (h, w), 0 or above.
        class_ids: Which classes.
        max_points: Most corners of all polygons together.

    Returns:
        JSON values, one for each connected region, ordered by class, then by first corner:
        ``class_id``; ``exterior``, its corners [x, y] clockwise from the topmost, leftmost one;
        ``holes``, a list of such lists, counterclockwise. Pixel (row, column) covers x from column
        to column + 1 and y from row to row + 1. The first corner is not repeated at the end, and
        no corner lies on a straight line.

    Raises:
        DatasetError: There are more than ``max_points`` corners.
    """
    corners = _find_corners(label_map, class_ids, max_points)
    if not len(corners.x):
        return []
    rings = [ring for loop in _trace_loops(corners) for ring in _split_loop(loop)]
    return _assign_holes(rings, label_map)


@dataclass(frozen=True, slots=True)
class _Corners:
    """Corners of outlines, an element of int64 arrays each; where two pixels touch are two.

    Attributes:
        x: Of the lattice point.
        y: Of the lattice point.
        label: Class that the outline belongs to.
        right: Whether its horizontal edge goes right from here.
        down: Whether its vertical edge goes down from here.
        leaves: Whether the outline's direction is along the horizontal edge, away from here.
        touches: Whether the outline may pass this point twice.
    """

    x: ndarray
    y: ndarray
    label: ndarray
    right: ndarray
    down: ndarray
    leaves: ndarray
    touches: ndarray


def _find_corners(label_map: ndarray, class_ids: Collection[int], max_points: int) -> _Corners:
    height, width = label_map.shape
    wanted = np.array(sorted(set(class_ids) - {_NO_CLASS}), np.int64)
    found = [np.zeros((7, 0), np.int64)]
    total = 0
    rows = max(1, _BLOCK_PIXELS // (width + 1))
    for top in range(0, height + 1, rows):
        # The lattice rows top to end - 1, each between two rows of pixels.
        end = min(top + rows, height + 1)
        block = np.full((end - top + 1, width + 2), _NO_CLASS, np.int32)
        low, high = max(top - 1, 0), min(end, height)
        block[low - top + 1 : high - top + 1, 1:-1] = label_map[low:high]
        corners = _block_corners(block, wanted)
        corners[1] += top
        found.append(corners)
        total += corners.shape[1]
        if total > max_points:
            raise DatasetError(
                f"polygons: over {max_points} corners in a label map of {height} x {width}, "
                f"expected at most that many"
            )
    return _Corners(*np.concatenate(found, axis=1))


def _block_corners(block: ndarray, class_ids: ndarray) -> ndarray:
    """Return (7, n) corners among the lattice points inside a block, fields as ``_Corners``."""
    four = [block[:-1, :-1], block[:-1, 1:], block[1:, :-1], block[1:, 1:]]
    first = four[0]
    y, x = np.nonzero((first != four[1]) | (first != four[2]) | (first != four[3]))
    here = [labels[y, x] for labels in four]
    found: list[ndarray] = []
    for quadrant, own in enumerate(here):
        right, down = quadrant % 2, quadrant // 2
        beside, below, across = here[quadrant ^ 1], here[quadrant ^ 2], here[quadrant ^ 3]
        convex = (own != beside) & (own != below)
        concave = convex & (beside == below) & (beside == across)
        # Clockwise around a pixel, the outline leaves horizontally at corners whose bottom right or
        # top left neighbour is the pixel; around a hole of one pixel, at the other corners.
        leaves = int(right == down)
        for chosen, label, leaving in ((convex, own, leaves), (concave, beside, 1 - leaves)):
            (at,) = np.nonzero(chosen & np.isin(label, class_ids))
            fields = np.empty((7, len(at)), np.int64)
            fields[:3] = x[at], y[at], label[at]
            fields[3:6] = np.array([right, down, leaving])[:, None]
            fields[6] = label[at] == across[at]
            found.append(fields)
    return np.concatenate(found, axis=1)


def _trace_loops(corners: _Corners) -> list[tuple[list[tuple[int, int]], bool]]:
    """Follow the outlines; return their points, and whether one may come twice."""
    c = corners
    along_row = _partners(np.lexsort((c.right, c.x, c.y, c.label)))
    along_column = _partners(np.lexsort((c.down, c.y, c.x, c.label)))
    following = along_column[along_row].tolist()
    partner = along_row.tolist()
    points = list(zip(c.x.tolist(), c.y.tolist(), strict=True))
    touches = c.touches.tolist()
    starts = np.lexsort((c.x, c.y, c.label))
    seen = bytearray(len(points))
    loops: list[tuple[list[tuple[int, int]], bool]] = []
    for start in starts[c.leaves[starts] == 1].tolist():
        loop: list[tuple[int, int]] = []
        touching = False
        corner = start
        while not seen[corner]:
            seen[corner] = 1
            other = partner[corner]
            loop += (points[corner], points[other])
            touching = touching or bool(touches[corner] or touches[other])
            corner = following[corner]
        if loop:
            loops.append((loop, touching))
    return loops


def _partners(order: ndarray) -> ndarray:
    """Return each corner's partner if those next to each other in ``order`` are joined."""
    partner = np.empty_like(order)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    return partner


def _split_loop(loop: tuple[list[tuple[int, int]], bool]) -> list[list[tuple[int, int]]]:
    """Cut a loop wherever it comes to a point again."""
    points, touching = loop
    if not touching:
        return [points]
    rings: list[list[tuple[int, int]]] = []
    path: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for point in points:
        if point in place:
            ring = path[place[point] :]
            del path[place[point] :]
            for passed in ring:
                del place[passed]
            rings.append(ring)
        place[point] = len(path)
        path.append(point)
    return [*rings, path]


def _assign_holes(rings: list[list[tuple[int, int]]], label_map: ndarray) -> list[dict[str, Any]]:
    """Give every hole to the exterior around it."""
    sizes = np.array([len(ring) for ring in rings])
    firsts = np.cumsum(sizes) - sizes
    x, y = np.array([point for ring in rings for point in ring]).T
    after = np.arange(1, len(x) + 1)
    after[firsts + sizes - 1] = firsts
    rise = y[after] - y
    # The shoelace formula: with y down, clockwise is above 0. Horizontal edges add nothing.
    is_hole = np.add.reduceat(x * rise, firsts) < 0
    # On upward edges the class is to the right: they are the starts of the runs of a row.
    (up,) = np.nonzero(rise < 0)
    height = len(label_map)
    keys = x[up] * (height + 1) + y[after][up]
    order = np.argsort(keys)
    keys, owners = keys[order], np.repeat(np.arange(len(rings)), sizes)[up][order]
    around = list(range(len(rings)))
    lefts = np.minimum.reduceat(x, firsts)
    for hole in np.flatnonzero(is_hole)[np.argsort(lefts[is_hole], kind="stable")].tolist():
        # A pixel of the class beside the hole's leftmost edge, and the run that it ends.
        column, row = min(rings[hole])
        run = label_map[row, :column]
        (others,) = np.nonzero(run != run[-1])
        start = int(others[-1]) + 1 if len(others) else 0
        edge = np.searchsorted(keys, start * (height + 1) + row, side="right") - 1
        # The run starts at the exterior, or at a hole further left, whose exterior is known.
        around[hole] = around[owners[edge]]
    return _build_polygons(rings, is_hole.tolist(), around, label_map)


def _build_polygons(
    rings: list[list[tuple[int, int]]],
    is_hole: Sequence[bool],
    exterior_of: Sequence[int],
    label_map: ndarray,
) -> list[dict[str, Any]]:
    polygons: dict[int, dict[str, Any]] = {}
    for index, ring in enumerate(rings):
        if not is_hole[index]:
            # The first point of an exterior is the top left corner of one of its pixels.
            column, row = ring[0]
            polygons[index] = {
                "class_id": int(label_map[row, column]),
                "exterior": [[x, y] for x, y in ring],
                "holes": [],
            }
    for index, ring in enumerate(rings):
        if is_hole[index]:
            polygons[exterior_of[index]]["holes"].append([[x, y] for x, y in ring])
    return list(polygons.values())
