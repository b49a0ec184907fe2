"""Late fusion: combine what the adapters predict instead of their weights (methods B.6)."""

from collections.abc import Sequence

import torch

from loraseg.errors import AdapterMismatchError
from loraseg.fuse.concat import check_weights
from loraseg.tensor_types import Float, Tensor, ndarray

__all__ = ["late_fusion"]


def late_fusion(
    score_maps: Sequence[Float[Tensor, "..."]], weights: Sequence[float] | ndarray | ndarray
) -> Float[Tensor, "..."]:
    """Return ``sum_i weights[i] * score_maps[i]``, one map at a time in the maps' own precision.

    Args:
        score_maps: One map per adapter after its own full forward pass, for instance sigmoid
            scores (t, h, w) in [0, 1]; all of one shape.
        weights: One finite weight per map; with sum 1 the result stays in the maps' range.

    Raises:
        AdapterMismatchError: Counts or shapes differ, or a weight is not finite.
    """
    check_weights(weights, len(score_maps))
    total = torch.zeros_like(score_maps[0])
    for i, (scores, weight) in enumerate(zip(score_maps, weights, strict=True)):
        if scores.shape != total.shape:
            raise AdapterMismatchError(
                f"score map {i}: got shape {tuple(scores.shape)}, expected "
                f"{tuple(total.shape)} as of map 0"
            )
        total.add_(scores, alpha=float(weight))
    return total
