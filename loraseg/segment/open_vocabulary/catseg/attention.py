"""Softmax attention by the kernel that is quickest where it runs."""

import torch
from torch import Tensor, nn

from loraseg.tensor_types import Float

__all__ = ["add_residual", "attend"]


def attend(
    q: Float[Tensor, "*b m c"],
    k: Float[Tensor, "*b n c"],
    v: Float[Tensor, "*b n c"],
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> Float[Tensor, "*b m c"]:
    """Return softmax(q k^T / sqrt(c) + mask) v.

    Args:
        q: Queries; as many as keys if ``causal``.
        k: Keys.
        v: Values.
        mask: Added to the scores; broadcast to (..., m, n).
        causal: Let no row see later ones; then without ``mask``.
    """
    slow = q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if not slow or causal:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # The fused kernel's backward pass in bfloat16 takes five times as long as these products.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def add_residual(x: Float[Tensor, "*b c"], change: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """Return x + change, in the memory of ``change`` where that has x's type.

    Under autocast it has not: the sum then keeps the full precision of the residual stream.
    """
    return change.add_(x) if change.dtype == x.dtype else x + change
