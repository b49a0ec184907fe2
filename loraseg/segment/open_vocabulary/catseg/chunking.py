"""Running the pieces of a large tensor one after the other where that is quicker."""

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
    """Return ``run(x)`` for a function that treats the entries of axis 1 apart.

    On the CPU without gradients it goes through axis 1 piece by piece: a piece's activations stay
    in the caches and in memory that the process already has, instead of fresh pages for every
    layer. A piece has at least four entries, for what is shared along the axis is made for each.

    Args:
        function: Maps (b, s, ...) to (b, s, ...), each entry of axis 1 by itself.
        x: All entries, with the channels last.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return function(x)
    tokens = x[:, 0, ..., 0].numel()
    pieces = x.split(max(_CHUNK_TOKENS // tokens, _MIN_CHUNK), dim=1)
    return (
        function(x) if len(pieces) == 1 else torch.cat([function(piece) for piece in pieces], dim=1)
    )
