"""Class aggregation of CAT-Seg: linear attention over the classes at each position."""

import torch
from torch import Tensor, nn

from loraseg.segment.open_vocabulary.catseg.attention import add_residual
from loraseg.segment.open_vocabulary.catseg.chunking import apply_chunked
from loraseg.segment.open_vocabulary.catseg.guided import GuidedLinear, call_guided
from loraseg.tensor_types import Float

__all__ = ["ClassLayer"]


class LinearAttention(nn.Module):
    """Linear attention over classes with the feature map elu + 1.

    ::

        q_t = f(W_q [x_t, e_t]),  k_t = f(W_k [x_t, e_t]),  v_t = W_v x_t,  f(z) = elu(z) + 1
        out_t = q_t^T (sum_s k_s v_s^T) / (q_t . sum_s k_s + 1e-6)

    * x_t: normed token of class t; e_t: its text guidance; per head, s over all classes and the
      padding rows.

    Linear attention: Katharopoulos et al. (arXiv 2006.16236), eq. 5 and 7. CAT-Seg (CVPR 2024),
    "Class Cost Aggregation"; official code: ``cat_seg/modeling/transformer/model.py``,
    ``LinearAttention`` and ``AttentionLayer``.

    Difference from the official code: it appends L - t equal padding rows. Here their key and
    value are computed once and multiplied by their number, and v is not divided by L beforehand.
    """

    def __init__(self, dim: int, guidance_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = GuidedLinear(dim + guidance_dim, dim)
        self.k = GuidedLinear(dim + guidance_dim, dim)
        self.v = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b n t c"],
        text: Float[Tensor, "b t a"],
        padding: tuple[Tensor, Tensor] | None,
        copies: int,
    ) -> Float[Tensor, "b n t c"]:
        """Attend over t classes and ``copies`` equal padding rows.

        Args:
            x: Normed tokens of t classes at n positions.
            text: Text guidance of each class.
            padding: Normed padding token (b, 1, c) and padding guidance (b, a), one row per image
                because adapters can differ between images; None without padding.
            copies: Number of padding rows; their outputs are not computed.
        """
        query, key = (
            _feature_map(call_guided(self.q, x, text)),
            _feature_map(call_guided(self.k, x, text)),
        )
        query, key, value = (y.unflatten(-1, (self.heads, -1)) for y in (query, key, self.v(x)))
        memory = torch.einsum("bnthd,bnthv->bnhdv", key, value)
        mass = key.sum(dim=2)
        if padding is not None and copies:
            pad_key = (copies * _feature_map(call_guided(self.k, *padding))).unflatten(
                -1, (self.heads, -1)
            )
            pad_value = self.v(padding[0]).unflatten(-1, (self.heads, -1))
            memory += torch.einsum("bnhd,bnhv->bnhdv", pad_key, pad_value)
            mass += pad_key
        scale = torch.einsum("bnthd,bnhd->bnth", query, mass) + 1e-6
        return (torch.einsum("bnthd,bnhdv->bnthv", query, memory) / scale[..., None]).flatten(-2)


def _feature_map(x: Tensor) -> Tensor:
    return nn.functional.elu(x, inplace=True) + 1


class ClassLayer(nn.Module):
    """Class aggregation: attention and MLP on the pooled input, added to the input.

    ``x + up(z)`` with the average-pooled input p, ``y = p + attention(LN(p), e)`` and
    ``z = y + MLP(LN(y))``. Official code: ``cat_seg/modeling/transformer/model.py``,
    ``ClassTransformerLayer``.
    """

    padding_tokens: nn.Parameter | None
    padding_guidance: nn.Parameter | None

    def __init__(
        self, dim: int, guidance_dim: int, heads: int, *, pad_len: int, pooling: tuple[int, int]
    ) -> None:
        super().__init__()
        self.pad_len = pad_len
        self.pooling = pooling
        self.attention = LinearAttention(dim, guidance_dim, heads)
        self.MLP = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.ReLU(inplace=True), nn.Linear(4 * dim, dim)
        )
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        padded = pad_len > 0
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, dim)) if padded else None
        self.padding_guidance = nn.Parameter(torch.zeros(1, 1, guidance_dim)) if padded else None

    def forward(
        self, x: Float[Tensor, "b t g g c"], text: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t g g c"]:
        """Mix the t classes of an image at each (pooled) position."""
        y = self._pool(x)
        sides = y.shape[2:4]
        y = apply_chunked(lambda chunk: self._attend(chunk, text), y.flatten(2, 3).transpose(1, 2))
        return x + self._unpool(y.transpose(1, 2).unflatten(2, sides), x.shape[2])

    def _attend(
        self, y: Float[Tensor, "b n t c"], text: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b n t c"]:
        copies = max(self.pad_len - y.shape[2], 0)
        y = add_residual(y, self.attention(self.norm1(y), text, self._padding(len(y)), copies))
        return add_residual(y, self.MLP(self.norm2(y)))

    def _padding(self, images: int) -> tuple[Tensor, Tensor] | None:
        if self.padding_tokens is None or self.padding_guidance is None:
            return None
        token = self.norm1(self.padding_tokens).expand(images, -1, -1)
        return token, self.padding_guidance[0].expand(images, -1)

    def _pool(self, x: Tensor) -> Tensor:
        size = self.pooling[0 if self.training else 1]
        if size == 1:
            return x
        pooled = nn.functional.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), size)
        return pooled.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])

    def _unpool(self, y: Tensor, side: int) -> Tensor:
        if y.shape[2] == side:
            return y
        maps = y.flatten(0, 1).permute(0, 3, 1, 2)
        maps = nn.functional.interpolate(maps, (side, side), mode="bilinear", align_corners=True)
        return maps.permute(0, 2, 3, 1).unflatten(0, y.shape[:2])
