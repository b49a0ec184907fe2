"""Sliding windows of CAT-Seg's inference, and their average.

Official code: ``cat_seg/cat_seg_model.py``, ``CATSeg.inference_sliding_window``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraseg.tensor_types import Float

__all__ = ["SlidingWindowGrid"]

_OVERLAP = 0.333


@dataclass(frozen=True, slots=True)
class SlidingWindowGrid:
    """Two by two windows that overlap by a third and cover a square canvas.

    Attributes:
        window: Side of a window, pixels; 384 in the official code, with stride 256 and canvas 640.
    """

    window: int

    @property
    def stride(self) -> int:
        """Distance between the starts of neighbouring windows, pixels."""
        return int(self.window * (1 - _OVERLAP))

    @property
    def canvas(self) -> int:
        """Side of the canvas, pixels."""
        return self.window + self.stride

    @property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """Top and left of each window, row by row."""
        return tuple((top, left) for top in (0, self.stride) for left in (0, self.stride))

    def cut(self, canvas: Float[Tensor, "c s s"]) -> list[Float[Tensor, "c w w"]]:
        """Return the windows of a canvas."""
        size = self.window
        return [canvas[:, top : top + size, left : left + size] for top, left in self.corners]

    def average(self, windows: Sequence[Tensor]) -> Float[Tensor, "t s s"]:
        """Assemble windows (t, w, w) on the canvas, averaged where they overlap."""
        size, first = self.window, windows[0]
        total = first.new_zeros(first.shape[0], self.canvas, self.canvas)
        count = first.new_zeros(self.canvas, self.canvas)
        for window, (top, left) in zip(windows, self.corners, strict=True):
            total[:, top : top + size, left : left + size] += window
            count[top : top + size, left : left + size] += 1
        return torch.div(total, count, out=total)
