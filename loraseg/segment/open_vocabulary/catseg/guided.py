"""Linear layers on tokens that are concatenated with a shared guidance."""

from typing import Any

import torch
from torch import Tensor, nn

from loraseg.tensor_types import Float

__all__ = ["GuidedLinear", "call_guided"]


class GuidedLinear(nn.Linear):
    """A linear layer of ``[x, guide]`` that multiplies the shared guide only once.

    ``W [x, g] + b = W_x x + (W_g g + b)``; the parameters are those of ``nn.Linear``.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch calls it `input`
        self, x: Float[Tensor, "b s *p i"], guide: Float[Tensor, "b *p a"] | None = None
    ) -> Float[Tensor, "b s *p o"]:
        """Return W [x, guide] + b.

        Args:
            x: Tokens of width in_features - a, or the complete input without a guide.
            guide: Guidance, shared along axis 1 of x.
        """
        if guide is None:
            return nn.functional.linear(x, self.weight, self.bias)
        x_weight, guide_weight = self.weight.split([x.shape[-1], guide.shape[-1]], dim=1)
        y = nn.functional.linear(x, x_weight)
        return y.add_(nn.functional.linear(guide, guide_weight, self.bias).unsqueeze(1))


def call_guided(
    layer: Any, x: Float[Tensor, "b s *p i"], guide: Float[Tensor, "b *p a"]
) -> Float[Tensor, "b s *p o"]:
    """Call a guided layer, or a module that replaces it, on ``[x, guide]``.

    Args:
        layer: A :class:`GuidedLinear`, or a wrapper such as peft's, which takes the concatenated
            input.
        x: Tokens.
        guide: Guidance, shared along axis 1 of x.
    """
    if isinstance(layer, GuidedLinear):
        return layer(x, guide)
    expanded = guide.unsqueeze(1).expand(*x.shape[:-1], -1)
    return layer(torch.cat([x, expanded], dim=-1))
