"""Softmax attention with the fastest kernel for device and dtype."""

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
    """Return ``softmax(q k^T / sqrt(c) + mask) v``.

    Args:
        q: Queries; with ``causal``, m = n.
        k: Keys.
        v: Values.
        mask: Added to the scores; broadcast to (..., m, n).
        causal: Whether to mask later rows; excludes ``mask``.
    """
    slow = q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if not slow or causal:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # The backward pass of the fused kernel is five times slower in bfloat16 on the CPU.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def add_residual(x: Float[Tensor, "*b c"], change: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """Return x + change, in place in ``change`` if both have the same dtype.

    Under autocast they differ; the sum then has the full precision of the residual stream.
    """
    return change.add_(x) if change.dtype == x.dtype else x + change
