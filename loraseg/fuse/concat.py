"""Exact fusion of LoRA adapters by concatenation along the rank.

SemLA (arXiv 2503.21780), concat-based merging; in its code
``domain_orchestrator/domain_orchestrator.py``, ``DomainOrchestrator._merge_adapters``, which calls
peft's ``add_weighted_adapter`` with ``combination_type="cat"``.
"""

from collections.abc import Sequence

import torch

from loraseg.errors import AdapterMismatchError
from loraseg.tensor_types import Float, Tensor

__all__ = ["concat_lora"]


def concat_lora(
    downs: Sequence[Float[Tensor, "_ _"]],
    ups: Sequence[Float[Tensor, "_ _"]],
    weights: Sequence[float],
) -> tuple[Float[Tensor, "r_sum d_in"], Float[Tensor, "d_out r_sum"]]:
    """Stack n LoRA pairs so that one product equals their weighted sum.

    ``down = [w_1 A_1; ...; w_n A_n]`` and ``up = [B_1, ..., B_n]``, hence
    ``up @ down == sum_i w_i B_i A_i`` up to rounding. The rank grows to
    ``r_sum = sum_i r_i``; no (d_out, d_in) matrix is formed.

    Args:
        downs: A_i, one (r_i, d_in) matrix per adapter; ranks may differ.
        ups: B_i, one (d_out, r_i) matrix per adapter. The LoRA scale
            alpha_i / r_i must already be part of a factor or of the weight.
        weights: w_i, one weight per adapter; any sign, need not sum to one.

    Returns:
        The stacked pair (down, up).

    Raises:
        AdapterMismatchError: Counts differ, or a pair disagrees with adapter 0
            on d_in or d_out, or with itself on its rank.
    """
    if not len(downs) == len(ups) == len(weights) > 0:
        raise AdapterMismatchError(
            f"need one down, up and weight per adapter, and at least one adapter: "
            f"got {len(downs)} downs, {len(ups)} ups, {len(weights)} weights"
        )
    d_in, d_out = downs[0].shape[1], ups[0].shape[0]
    for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
        rank = down.shape[0]
        if down.shape[1] != d_in or up.shape != (d_out, rank):
            raise AdapterMismatchError(
                f"adapter {i}: down {tuple(down.shape)}, up {tuple(up.shape)}; "
                f"expected down (r, {d_in}) and up ({d_out}, r) as in adapter 0"
            )
    # The weight goes on one side, since sqrt(w) on both would exclude negative weights. peft's
    # `cat` also scales the down side, so the factors are comparable one by one.
    scaled = [weight * down for weight, down in zip(weights, downs, strict=True)]
    return torch.cat(scaled, dim=0), torch.cat(list(ups), dim=1)
