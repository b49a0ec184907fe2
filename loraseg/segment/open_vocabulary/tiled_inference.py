"""Images far larger than what the model sees: overlapping tiles, blended without seams.

Along each axis, windows at the image's own resolution begin evenly spread and overlap by at least
half. Between the centres of two neighbours, one's scores fade into the other's by a raised cosine,
which for an overlap of one half is a Hann window; before the first centre and behind the last, one
window speaks alone. So every pixel has at most two windows an axis, their weights sum to one, and
the border of a window, where it knows least, has no weight unless it is the image's. A side that
is shorter than a window is covered whole: such windows are not square, and the model squeezes them
as plain prediction squeezes any image.

Memory, beyond the image and the result: tiles are kept as coarse as the model gives them, only
those of one line, and lines run along the image's shorter side. Pixels are blended block by block.
"""

import math
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
import torch
from torch import Tensor

from loraseg.fuse.mix import Mix
from loraseg.segment.open_vocabulary.pixel_maps import PixelMaps, empty_maps, pixel_maps
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.sliding_window import SlidingWindowGrid
from loraseg.tensor_types import Float, ndarray

__all__ = ["needs_tiling", "segment_tiled", "tile_count"]

# The published procedure squeezes Cityscapes, 2048 pixels wide, to a canvas of 640. For images that
# would be squeezed more than that no published number speaks, and they are cut into tiles.
_MAX_DOWNSCALE = 3.2
# Windows between two yields; fewer with many classes, whose maps are large.
_WINDOWS_PER_STEP = 8
_MAX_SCORE_MAPS = 512


def needs_tiling(height: int, width: int, predictor: Predictor) -> bool:
    """Tell whether squeezing an image into what the predictor sees would lose too much detail.

    That is so if its longer side is over 3.2 times that of what is seen: of the window in plain
    mode, of the canvas (5/3 of it) in sliding mode.
    """
    window = predictor.base.window
    seen = SlidingWindowGrid(window).canvas if predictor.mode == "sliding" else window
    return max(height, width) > _MAX_DOWNSCALE * seen


def tile_count(height: int, width: int, predictor: Predictor) -> int:
    """Return how many tiles :func:`segment_tiles` cuts an image into."""
    rows, columns = (_make_axis(length, predictor.base.window) for length in (height, width))
    return len(rows.starts) * len(columns.starts)


def segment_tiled(
    predictor: Predictor,
    image: ndarray,
    classes: Sequence[str],
    mix: Mix | None = None,
    maps: Collection[str] = (),
) -> Generator[None, None, PixelMaps]:
    """Segment an image of any size in overlapping tiles of ``base.window`` pixels.

    An image of exactly one window gives what plain prediction gives.

    Args:
        predictor: Its mode does not matter here.
        image: RGB, uint8 (h, w, 3).
        classes: As in :meth:`Predictor.predict`.
        mix: The adapters in use, for all tiles.
        maps: Further maps, of ``MAPS``.

    Yields:
        None after each batch of windows, so that a caller may do other work or give up.

    Returns:
        The maps of the whole image.

    Raises:
        ConfigError, DatasetError, AdapterMismatchError: As :meth:`Predictor.predict`.
    """
    height, width = image.shape[:2]
    rows, columns = (_make_axis(length, predictor.base.window) for length in (height, width))
    found = empty_maps(height, width, len(classes), maps)
    tiles: dict[tuple[int, int], Tensor] = {}
    batch = min(
        _WINDOWS_PER_STEP,
        predictor.windows_per_batch,
        max(1, _MAX_SCORE_MAPS // max(1, len(classes))),
    )
    order = _tile_order(rows, columns)
    while places := list(islice(order, batch)):
        windows = [image[rows.span(row), columns.span(column)] for row, column in places]
        scores = predictor.score_windows(windows, classes, mix)
        for place, coarse in zip(places, scores, strict=True):
            tiles[place] = coarse
            for cell in _completed_cells(place, rows, columns):
                _blend_cell(found, tiles, cell, (rows, columns))
            _drop_unneeded(tiles, place, rows, columns)
        yield
    return found


@dataclass(frozen=True, slots=True)
class _Axis:
    """Windows along one axis of an image: its length, theirs, and the first pixel of each."""

    length: int
    window: int
    starts: tuple[int, ...]

    @property
    def last_index(self) -> int:
        return len(self.starts) - 1

    def span(self, index: int) -> slice:
        return slice(self.starts[index], self.starts[index] + self.window)

    def centre(self, index: int) -> float:
        return self.starts[index] + self.window / 2


@dataclass(frozen=True, slots=True)
class _WindowWeights:
    """What one window gives to a run of pixels.

    Attributes:
        window: Its number along the axis.
        coarse: The pixels of its coarse map that are used.
        matrix: (pixels, coarse pixels): interpolation times weight.
    """

    window: int
    coarse: slice
    matrix: Float[Tensor, "n k"]


def _make_axis(length: int, window: int) -> _Axis:
    window = min(window, length)
    rest = length - window
    steps = math.ceil(rest / max(window // 2, 1))
    return _Axis(length, window, (0, *(rest * step // steps for step in range(1, steps + 1))))


def _tile_order(rows: _Axis, columns: _Axis) -> Generator[tuple[int, int], None, None]:
    """Yield tiles line by line, the lines along the shorter side."""
    if rows.length >= columns.length:
        yield from product(range(rows.last_index + 1), range(columns.last_index + 1))
    else:
        for column, row in product(range(columns.last_index + 1), range(rows.last_index + 1)):
            yield row, column


def _completed_cells(
    tile: tuple[int, int], rows: _Axis, columns: _Axis
) -> Generator[tuple[int, int], None, None]:
    """Yield the cells that have all their tiles now that this one is there.

    Cell (r, c) lies between the centres of the tiles r-1 and r, c-1 and c, as far as these exist.
    """
    row, column = tile
    below = (row, row + 1) if row == rows.last_index else (row,)
    beside = (column, column + 1) if column == columns.last_index else (column,)
    yield from product(below, beside)


def _drop_unneeded(
    tiles: dict[tuple[int, int], Tensor], tile: tuple[int, int], rows: _Axis, columns: _Axis
) -> None:
    """Drop tiles that no cell to come needs."""
    row, column = tile
    tiles.pop((row - 1, column - 1), None)
    if column == columns.last_index:
        tiles.pop((row - 1, column), None)
    if row == rows.last_index:
        tiles.pop((row, column - 1), None)


def _blend_cell(
    output: PixelMaps,
    tiles: dict[tuple[int, int], Tensor],
    cell: tuple[int, int],
    axes: tuple[_Axis, _Axis],
) -> None:
    """Blend the scores of one cell, and keep of them what is asked for."""
    any_tile = next(iter(tiles.values()))
    (down, row_parts), (across, column_parts) = (
        _cell_weights(axis, index, any_tile) for axis, index in zip(axes, cell, strict=True)
    )
    if down.start == down.stop or across.start == across.stop:
        return  # the half of a window of one pixel
    parts = [
        row.matrix
        @ tiles[row.window, column.window][:, row.coarse, column.coarse]
        @ column.matrix.T
        for row, column in product(row_parts, column_parts)
    ]
    # Rounding may pass 1 by a bit.
    scores = torch.stack(parts).sum(dim=0).clamp_(0, 1)
    asked = [name for name in ("confidence", "entropy") if getattr(output, name) is not None]
    block = pixel_maps(scores, asked)
    for name in ("label_map", *asked):
        getattr(output, name)[down, across] = getattr(block, name)


def _cell_weights(axis: _Axis, index: int, like: Tensor) -> tuple[slice, list[_WindowWeights]]:
    """Return the pixels from the centre of window ``index - 1`` to the next, and their windows."""
    low = axis.centre(index - 1) if index else 0.0
    high = axis.centre(index) if index <= axis.last_index else float(axis.length)
    first, end = math.ceil(low - 0.5), math.ceil(high - 0.5)
    middles = np.arange(first, end) + 0.5
    rise = (1 - np.cos(np.pi * (middles - low) / (high - low))) / 2
    if index == 0:
        weights = {0: np.ones_like(rise)}
    elif index > axis.last_index:
        weights = {axis.last_index: np.ones_like(rise)}
    else:
        weights = {index - 1: 1 - rise, index: rise}
    parts = [
        _window_weights(window, (middles - axis.starts[window]) / axis.window, weight, like)
        for window, weight in weights.items()
        if len(middles)
    ]
    return slice(first, end), parts


def _window_weights(
    window: int, positions: ndarray, weight: ndarray, like: Tensor
) -> _WindowWeights:
    """Write bilinear interpolation as a matrix; ``positions`` are shares of the window's side."""
    side = like.shape[-1]
    source = np.clip(positions * side - 0.5, 0, side - 1)
    before = np.floor(source).astype(np.int64)
    after = np.minimum(before + 1, side - 1)
    coarse = slice(int(before[0]), int(after[-1]) + 1)
    spread = np.zeros((len(positions), coarse.stop - coarse.start))
    lines = np.arange(len(positions))
    spread[lines, before - coarse.start] += weight * (1 - (source - before))
    spread[lines, after - coarse.start] += weight * (source - before)
    return _WindowWeights(window, coarse, torch.from_numpy(spread).to(like))
