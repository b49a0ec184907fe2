"""Late fusion: combine what the adapters predict instead of their weights (methods B.6)."""

from collections.abc import Sequence

import torch

from loraseg.errors import AdapterMismatchError
from loraseg.fuse.mix import check_weights
from loraseg.tensor_types import Float, Tensor, ndarray

__all__ = ["LateFusion", "late_fusion"]


class LateFusion:
    """The weighted sum of score maps that arrive one after the other.

    Memory does not depend on how many there are.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, scores: Float[Tensor, "..."], weight: float) -> None:
        """Add ``weight * scores`` in the maps' own precision.

        Raises:
            AdapterMismatchError: Its shape is not that of the first map.
        """
        if self._total is None:
            self._total = torch.zeros_like(scores)
        if scores.shape != self._total.shape:
            raise AdapterMismatchError(
                f"score map: got shape {tuple(scores.shape)}, expected "
                f"{tuple(self._total.shape)} as of the first"
            )
        self._total.add_(scores, alpha=weight)

    @property
    def total(self) -> Float[Tensor, "..."]:
        """The sum so far.

        Raises:
            AdapterMismatchError: Nothing was added.
        """
        if self._total is None:
            raise AdapterMismatchError("late fusion: expected at least one score map")
        return self._total


def late_fusion(
    score_maps: Sequence[Float[Tensor, "..."]], weights: Sequence[float] | ndarray
) -> Float[Tensor, "..."]:
    """Return ``sum_i weights[i] * score_maps[i]``.

    Args:
        score_maps: One map per adapter after its own full forward pass, for instance sigmoid
            scores (t, h, w) in [0, 1]; all of one shape.
        weights: One finite weight per map; with sum 1 the result stays in the maps' range.

    Raises:
        AdapterMismatchError: Counts or shapes differ, or a weight is not finite.
    """
    check_weights(weights, len(score_maps))
    late = LateFusion()
    for scores, weight in zip(score_maps, weights, strict=True):
        late.add(scores, float(weight))
    return late.total
