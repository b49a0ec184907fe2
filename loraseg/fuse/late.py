"""Late fusion: the predictions of the adapters are combined instead of their weights.

SemLA (arXiv 2503.21780) reports it as a baseline ("SemLA Late Fusion", "Uniform Late Fusion"); its
code does not contain it. Here sigmoid score maps are summed with the mixing weights.
"""

from collections.abc import Sequence

import torch

from loraseg.errors import AdapterMismatchError
from loraseg.fuse.mix import check_weights
from loraseg.tensor_types import Float, Tensor, ndarray

__all__ = ["LateFusion", "late_fusion"]


class LateFusion:
    """Running weighted sum of score maps; memory does not grow with their number."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, scores: Float[Tensor, "..."], weight: float) -> None:
        """Add ``weight * scores`` in the dtype of the first map.

        Args:
            scores: Any shape, such as (t, h, w); the same for every map.
            weight: Mixing weight of the map.

        Raises:
            AdapterMismatchError: The shape differs from that of the first map.
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
        """The sum of the maps added so far, in their shape.

        Raises:
            AdapterMismatchError: No map was added.
        """
        if self._total is None:
            raise AdapterMismatchError("late fusion: expected at least one score map")
        return self._total


def late_fusion(
    score_maps: Sequence[Float[Tensor, "..."]], weights: Sequence[float] | ndarray
) -> Float[Tensor, "..."]:
    """Return ``sum_i weights[i] * score_maps[i]``.

    Args:
        score_maps: One map per adapter, from a full forward pass with that adapter, such as
            sigmoid scores (t, h, w) in [0, 1]; all of one shape.
        weights: One finite weight per map. If they are non-negative and sum to 1, the result
            stays in the range of the maps.

    Raises:
        AdapterMismatchError: Counts or shapes differ, or a weight is not finite.
    """
    check_weights(weights, len(score_maps))
    fusion = LateFusion()
    for scores, weight in zip(score_maps, weights, strict=True):
        fusion.add(scores, float(weight))
    return fusion.total
