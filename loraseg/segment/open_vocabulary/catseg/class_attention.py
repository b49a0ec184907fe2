"""Class aggregation: linear attention over the classes at each place (methods A.5, "Class")."""

import torch
from torch import Tensor, nn

from loraseg.segment.open_vocabulary.catseg.attention import add_residual
from loraseg.segment.open_vocabulary.catseg.chunking import apply_chunked
from loraseg.segment.open_vocabulary.catseg.guided import GuidedLinear, call_guided
from loraseg.tensor_types import Float

__all__ = ["ClassLayer"]


class LinearAttention(nn.Module):
    """Attention with the feature map elu + 1; q and k also see the text guidance."""

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

        The rows' own outputs are dropped by the caller, and as keys they are all one vector, so
        that they enter the two sums as ``copies`` times that vector: exact, at the cost of one.

        Args:
            x: Normed tokens of t classes at n places.
            text: Text guidance of each class.
            padding: Normed padding token (b, 1, c) and padding guidance (b, a), one row an image
                since adapters may differ between images; None without padding.
            copies: Number of padding rows.
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
    """Pooled class attention and MLP, added to its input.

    The identity enters twice: y starts as the pooled input and is added to the input at the end.
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
        """Let the t classes of an image exchange at each (pooled) place."""
        y = self._pool(x)
        sides = y.shape[2:4]
        y = apply_chunked(lambda part: self._attend(part, text), y.flatten(2, 3).transpose(1, 2))
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
