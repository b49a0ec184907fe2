"""Spatial aggregation of CAT-Seg: two guided Swin blocks.

CAT-Seg (CVPR 2024), "Spatial Cost Aggregation"; official code:
``cat_seg/modeling/transformer/model.py``, ``SwinTransformerBlockWrapper``. Shifted windows: Swin
Transformer (arXiv 2103.14030), section 3.2.
"""

import torch
from torch import Tensor, nn

from loraseg.segment.open_vocabulary.catseg.attention import add_residual, attend
from loraseg.segment.open_vocabulary.catseg.guided import GuidedLinear, call_guided
from loraseg.tensor_types import Float

__all__ = ["SwinPair"]


def partition(x: Float[Tensor, "*b g g c"], window: int) -> Float[Tensor, "*b m n c"]:
    """Split a square map into m windows (row by row) of n = window**2 tokens."""
    side = x.shape[-2] // window
    blocks = x.unflatten(-2, (side, window)).unflatten(-4, (side, window))
    return blocks.transpose(-3, -4).flatten(-3, -2).flatten(-4, -3)


def merge(windows: Float[Tensor, "*b m n c"], window: int) -> Float[Tensor, "*b g g c"]:
    """Invert :func:`partition`."""
    side = round(windows.shape[-3] ** 0.5)
    blocks = windows.unflatten(-2, (window, window)).unflatten(-4, (side, side))
    return blocks.transpose(-3, -4).flatten(-3, -2).flatten(-4, -3)


def shift_mask(grid: int, window: int, shift: int) -> Float[Tensor, "m n n"]:
    """Return the additive mask of shifted windows: 0 for tokens of one region, else -100.

    The roll moves rows and columns from the opposite border into the last windows. Three bands per
    side give nine regions.
    """
    # Explicitly on the CPU: checkpoints build models on the meta device, without buffer values.
    band = torch.zeros(grid, device="cpu")
    band[grid - window :] = 1
    band[grid - shift :] = 2
    region = partition((3 * band[:, None] + band)[..., None], window)[..., 0]
    same = region[:, :, None] == region[:, None, :]
    return torch.where(same, 0.0, -100.0)


class WindowAttention(nn.Module):
    """Attention within windows; q and k are computed from ``[x, guidance]``, v from x."""

    def __init__(self, dim: int, guidance_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = GuidedLinear(dim + guidance_dim, dim)
        self.k = GuidedLinear(dim + guidance_dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b t m n c"],
        guidance: Float[Tensor, "b m n a"],
        mask: Float[Tensor, "m n n"] | None,
    ) -> Float[Tensor, "b t m n c"]:
        # Windows and heads share an axis: the fused kernel takes four axes and one mask per image.
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(-3, -2).flatten(2, 3).flatten(0, 1)
            for y in (call_guided(self.q, x, guidance), call_guided(self.k, x, guidance), self.v(x))
        )
        bias = None if mask is None else mask.repeat_interleave(self.heads, dim=0)[None]
        mixed = attend(q, k, v, bias)
        mixed = mixed.unflatten(1, (x.shape[2], self.heads)).transpose(-3, -2).flatten(-2)
        return self.proj(mixed.unflatten(0, x.shape[:2]))


class SwinMlp(nn.Module):
    """Linear, exact GELU, linear, with a hidden width of 4 c."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """One pre-norm Swin block; without roll and mask if the shift is 0."""

    attn_mask: Tensor | None

    def __init__(
        self, dim: int, guidance_dim: int, heads: int, *, grid: int, window: int, shift: int
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, guidance_dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = SwinMlp(dim)
        mask = shift_mask(grid, window, shift) if shift else None
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(
        self, x: Float[Tensor, "b t g g c"], guidance: Float[Tensor, "b g g a"]
    ) -> Float[Tensor, "b t g g c"]:
        mixed = self.attn(self._windows(self.norm1(x)), self._windows(guidance), self.attn_mask)
        mixed = merge(mixed, self.window)
        if self.shift:
            mixed = mixed.roll((self.shift, self.shift), (-3, -2))
        x = add_residual(x, mixed)
        return add_residual(x, self.mlp(self.norm2(x)))

    def _windows(self, x: Tensor) -> Tensor:
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (-3, -2))
        return partition(x, self.window)


class SwinPair(nn.Module):
    """An unshifted and a shifted Swin block that share the norm of the appearance guidance.

    If the window is at least the grid, one window covers it and neither block is shifted.
    """

    def __init__(self, dim: int, guidance_dim: int, heads: int, *, grid: int, window: int) -> None:
        super().__init__()
        window, shift = (grid, 0) if window >= grid else (window, window // 2)
        self.block_1 = SwinBlock(dim, guidance_dim, heads, grid=grid, window=window, shift=0)
        self.block_2 = SwinBlock(dim, guidance_dim, heads, grid=grid, window=window, shift=shift)
        self.guidance_norm = nn.LayerNorm(guidance_dim)

    def forward(
        self, x: Float[Tensor, "b t g g c"], appearance: Float[Tensor, "b g g a"]
    ) -> Float[Tensor, "b t g g c"]:
        """Mix each class map within its windows, guided by the appearance of the image."""
        guidance = self.guidance_norm(appearance)
        return self.block_2(self.block_1(x, guidance), guidance)
