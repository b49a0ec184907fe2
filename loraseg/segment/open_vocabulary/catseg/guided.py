"""Linear layers whose input is tokens beside a guidance that many of them share."""

from typing import Any

import torch
from torch import Tensor, nn

from loraseg.tensor_types import Float

__all__ = ["GuidedLinear", "call_guided"]


class GuidedLinear(nn.Linear):
    """A Linear of ``[x, guide]`` that multiplies the shared guide once.

    W [x, g] + b = W_x x + (W_g g + b); parameters are those of the plain Linear.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - x, as everywhere here
        self, x: Float[Tensor, "b s *p i"], guide: Float[Tensor, "b *p a"] | None = None
    ) -> Float[Tensor, "b s *p o"]:
        """Return W [x, guide] + b.

        Args:
            x: Tokens of width in_features - a; without a guide already the whole input.
            guide: Shared along axis 1 of x.
        """
        if guide is None:
            return nn.functional.linear(x, self.weight, self.bias)
        own, shared = self.weight.split([x.shape[-1], guide.shape[-1]], dim=1)
        y = nn.functional.linear(x, own)
        return y.add_(nn.functional.linear(guide, shared, self.bias).unsqueeze(1))


def call_guided(
    layer: Any, x: Float[Tensor, "b s *p i"], guide: Float[Tensor, "b *p a"]
) -> Float[Tensor, "b s *p o"]:
    """Call a guided layer, or whatever stands in its place, on ``[x, guide]``.

    Args:
        layer: A :class:`GuidedLinear`; or, in a model that peft wrapped, its layer around one,
            which takes the concatenated input.
        x: Tokens.
        guide: Shared along axis 1 of x.
    """
    if isinstance(layer, GuidedLinear):
        return layer(x, guide)
    spread = guide.unsqueeze(1).expand(*x.shape[:-1], -1)
    return layer(torch.cat([x, spread], dim=-1))
