"""Chunked evaluation of functions on large tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from loraseg.tensor_types import Float

__all__ = ["apply_chunked"]

_CHUNK_TOKENS = 4608
_MIN_CHUNK = 4


def apply_chunked(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "b s *rest"]
) -> Float[Tensor, "b s *more"]:
    """Return ``function(x)`` for a function that is independent along axis 1.

    On the CPU without gradients it runs on chunks of axis 1, whose activations stay in the caches
    and in memory that is already mapped. A chunk has at least four entries, because quantities
    shared along the axis are recomputed for each chunk.

    Args:
        function: Maps (b, s, ...) to (b, s, ...), independently for each entry of axis 1.
        x: The input, with channels last.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return function(x)
    tokens = x[:, 0, ..., 0].numel()
    chunks = x.split(max(_CHUNK_TOKENS // tokens, _MIN_CHUNK), dim=1)
    return (
        function(x) if len(chunks) == 1 else torch.cat([function(chunk) for chunk in chunks], dim=1)
    )
