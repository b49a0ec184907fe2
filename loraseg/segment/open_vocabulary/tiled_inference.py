"""Inference on images much larger than the model's input: overlapping tiles, blended seamlessly.

Along each axis, windows at the resolution of the image start at even distances and overlap by at
least half. Between the centres of two neighbours the weights follow a raised cosine, which is a
Hann window for an overlap of one half; before the first and after the last centre a single window
has weight one. Every pixel therefore has at most two windows per axis, their weights sum to one,
and the border of a window has no weight unless it is the border of the image. A side shorter than
a window is covered completely; such windows are not square, and are resized to the model's input
like images in plain prediction.

Memory, in addition to image and result: the scores of the tiles are kept at the resolution of the
model and for one line of tiles only, and lines run along the shorter side of the image.
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

# Sliding inference of CAT-Seg resizes Cityscapes, 2048 pixels wide, to a canvas of 640. Images that
# would be reduced by a larger factor than any published result are tiled.
_MAX_DOWNSCALE = 3.2
# Windows between two yields; fewer with many classes, whose maps are large.
_WINDOWS_PER_STEP = 8
_MAX_SCORE_MAPS = 512


def needs_tiling(height: int, width: int, predictor: Predictor) -> bool:
    """Return whether an image should be tiled, because resizing it would lose too much detail.

    True if its longer side is more than 3.2 times the side that the predictor resizes it to: the
    window in plain mode, the canvas (5/3 of the window) in sliding mode.
    """
    window = predictor.base.window
    side = SlidingWindowGrid(window).canvas if predictor.mode == "sliding" else window
    return max(height, width) > _MAX_DOWNSCALE * side


def tile_count(height: int, width: int, predictor: Predictor) -> int:
    """Return the number of tiles that :func:`segment_tiled` splits an image into."""
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

    For an image of exactly one window the result equals that of plain prediction.

    Args:
        predictor: The predictor; its mode is not used.
        image: RGB, uint8 (h, w, 3).
        classes: See :meth:`Predictor.predict`.
        mix: Mix of adapters for all tiles.
        maps: Additional maps, names from ``MAPS``.

    Yields:
        None after each batch of windows, so that the caller can do other work or cancel.

    Returns:
        The maps (h, w) of the image.

    Raises:
        ConfigError, DatasetError, AdapterMismatchError: As :meth:`Predictor.predict`.
    """
    height, width = image.shape[:2]
    rows, columns = (_make_axis(length, predictor.base.window) for length in (height, width))
    output = empty_maps(height, width, len(classes), maps)
    tiles: dict[tuple[int, int], Tensor] = {}
    batch = min(
        _WINDOWS_PER_STEP,
        predictor.windows_per_batch,
        max(1, _MAX_SCORE_MAPS // max(1, len(classes))),
    )
    order = _tile_order(rows, columns)
    while indices := list(islice(order, batch)):
        windows = [image[rows.span(row), columns.span(column)] for row, column in indices]
        scores = predictor.score_windows(windows, classes, mix)
        for index, coarse in zip(indices, scores, strict=True):
            tiles[index] = coarse
            for cell in _completed_cells(index, rows, columns):
                _blend_cell(output, tiles, cell, (rows, columns))
            _drop_unneeded(tiles, index, rows, columns)
        yield
    return output


@dataclass(frozen=True, slots=True)
class _Axis:
    """The windows along one axis of an image.

    Attributes:
        length: Side of the image, pixels.
        window: Side of the windows, pixels.
        starts: First pixel of each window.
    """

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
    """The contribution of one window to a range of pixels.

    Attributes:
        window: Index of the window along the axis.
        coarse: Range of the window's score map that is used.
        matrix: (n pixels, k scores): interpolation times blending weight.
    """

    window: int
    coarse: slice
    matrix: Float[Tensor, "n k"]


def _make_axis(length: int, window: int) -> _Axis:
    window = min(window, length)
    last_start = length - window
    steps = math.ceil(last_start / max(window // 2, 1))
    starts = (0, *(last_start * step // steps for step in range(1, steps + 1)))
    return _Axis(length, window, starts)


def _tile_order(rows: _Axis, columns: _Axis) -> Generator[tuple[int, int], None, None]:
    """Yield the tiles (row, column) line by line, with lines along the shorter side."""
    if rows.length >= columns.length:
        yield from product(range(rows.last_index + 1), range(columns.last_index + 1))
    else:
        for column, row in product(range(columns.last_index + 1), range(rows.last_index + 1)):
            yield row, column


def _completed_cells(
    tile: tuple[int, int], rows: _Axis, columns: _Axis
) -> Generator[tuple[int, int], None, None]:
    """Yield the cells whose last missing tile is this one.

    Cell (r, c) lies between the centres of the tiles r-1 and r, and c-1 and c, if these exist.
    """
    row, column = tile
    cell_rows = (row, row + 1) if row == rows.last_index else (row,)
    cell_columns = (column, column + 1) if column == columns.last_index else (column,)
    yield from product(cell_rows, cell_columns)


def _drop_unneeded(
    tiles: dict[tuple[int, int], Tensor], tile: tuple[int, int], rows: _Axis, columns: _Axis
) -> None:
    """Drop tiles that no later cell needs."""
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
    """Blend the scores of one cell and write the requested maps."""
    any_tile = next(iter(tiles.values()))
    (row_span, row_weights), (column_span, column_weights) = (
        _cell_weights(axis, index, any_tile) for axis, index in zip(axes, cell, strict=True)
    )
    if row_span.start == row_span.stop or column_span.start == column_span.stop:
        return  # half a window of one pixel
    terms = [
        row.matrix
        @ tiles[row.window, column.window][:, row.coarse, column.coarse]
        @ column.matrix.T
        for row, column in product(row_weights, column_weights)
    ]
    # Rounding can exceed 1 slightly.
    scores = torch.stack(terms).sum(dim=0).clamp_(0, 1)
    requested = [name for name in ("confidence", "entropy") if getattr(output, name) is not None]
    block = pixel_maps(scores, requested)
    for name in ("label_map", *requested):
        getattr(output, name)[row_span, column_span] = getattr(block, name)


def _cell_weights(axis: _Axis, index: int, like: Tensor) -> tuple[slice, list[_WindowWeights]]:
    """Return the pixels between the centres of windows ``index - 1`` and ``index``, and weights."""
    low = axis.centre(index - 1) if index else 0.0
    high = axis.centre(index) if index <= axis.last_index else float(axis.length)
    first, end = math.ceil(low - 0.5), math.ceil(high - 0.5)
    pixels = np.arange(first, end) + 0.5
    ramp = (1 - np.cos(np.pi * (pixels - low) / (high - low))) / 2
    if index == 0:
        weights = {0: np.ones_like(ramp)}
    elif index > axis.last_index:
        weights = {axis.last_index: np.ones_like(ramp)}
    else:
        weights = {index - 1: 1 - ramp, index: ramp}
    return slice(first, end), [
        _window_weights(window, (pixels - axis.starts[window]) / axis.window, weight, like)
        for window, weight in weights.items()
        if len(pixels)
    ]


def _window_weights(
    window: int, positions: ndarray, weight: ndarray, like: Tensor
) -> _WindowWeights:
    """Return weighted bilinear interpolation as a matrix; ``positions`` are relative, in [0, 1]."""
    side = like.shape[-1]
    source = np.clip(positions * side - 0.5, 0, side - 1)
    before = np.floor(source).astype(np.int64)
    after = np.minimum(before + 1, side - 1)
    coarse = slice(int(before[0]), int(after[-1]) + 1)
    matrix = np.zeros((len(positions), coarse.stop - coarse.start))
    rows = np.arange(len(positions))
    matrix[rows, before - coarse.start] += weight * (1 - (source - before))
    matrix[rows, after - coarse.start] += weight * (source - before)
    return _WindowWeights(window, coarse, torch.from_numpy(matrix).to(like))
