"""Regions: the text tokens that each position of an image can attend to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import adaptive_max_pool2d, interpolate

from loraseg.errors import DatasetError, StageError
from loraseg.synth.conditioning import Condition, Downsampling
from loraseg.tensor_types import Bool, Float, Int, Tensor, UInt8

__all__ = ["Regions", "token_grid"]

# Rows of the additive mask start at a multiple of this many values; otherwise fused GPU attention
# copies the mask into such a layout at every call.
_ROW_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """The regions of b samples, and the attention masks made from them at each resolution.

    A position of class c attends to the tokens of class c and to those of no class (-1: start,
    end, padding, words of the template); a position without a class (255) only to the latter.
    This is the mask M of rectified cross-attention (FreestyleNet, arXiv 2303.14412; in its code
    ``ldm/modules/attention_ADE20K.py``, ``CrossAttention.forward``), which MatchMask uses:
    ``M[i, j] = 1`` if token j has no class or has the class of position i.

    Differences from FreestyleNet's code: words may have any number of tokens (there, a list names
    the classes of two or three), the ignore label is supported, and latents need not be square.

    Attributes:
        labels: (b, H, W) class ids at the size of the masks; 255 for positions without a class.
        token_classes: (n, l), n = b, class id of each token, -1 for none.
        downsampling: ``nearest`` takes one pixel per cell, as ``interpolate(mode="nearest")``;
            ``max`` lets a cell attend to the tokens of every class that has a pixel in it, so
            that thin objects do not vanish at coarse resolutions.

    Raises:
        DatasetError: The counts differ, or a sample has no token without a class.
    """

    labels: UInt8[Tensor, "b H W"] | Int[Tensor, "b H W"]
    token_classes: Int[Tensor, "n l"]
    downsampling: Downsampling = "nearest"
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)
    _biases: dict[tuple[int, int, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.token_classes):
            raise DatasetError(
                f"regions of {len(self.labels)} samples, but tokens of {len(self.token_classes)}"
            )
        invalid = ~(self.token_classes == -1).any(dim=1)
        if invalid.any():
            raise DatasetError(
                f"sample {int(invalid.nonzero()[0])}: every token belongs to a class; expected at "
                "least one without a class, such as the start token"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def stack(
        cls, conditions: Sequence[Condition], device: torch.device | str = "cpu"
    ) -> "Regions":
        """Stack the conditions of several samples.

        Raises:
            DatasetError: There are no conditions, or they differ in mask size, number of tokens
                or downsampling.
        """
        if not conditions:
            raise DatasetError("regions of a batch: got no conditions, expected at least one")
        first = conditions[0]
        for index, other in enumerate(conditions):
            got, expected = _signature(other), _signature(first)
            if got != expected:
                raise DatasetError(
                    f"condition {index} of a batch: got {got}, expected {expected} as in 0"
                )
        return cls(
            torch.stack([torch.from_numpy(c.regions) for c in conditions]).to(device),
            torch.stack([torch.from_numpy(c.token_classes) for c in conditions]).to(device),
            first.downsampling,
        )

    def mask(self, rows: int, columns: int) -> Bool[Tensor, "b 1 positions l"]:
        """Return True where a position of the (rows, columns) grid can attend to a token."""
        mask = self._masks.get((rows, columns))
        if mask is None:
            shared_tokens = (self.token_classes == -1)[:, None, :]
            reduce = self._nearest_mask if self.downsampling == "nearest" else self._any_pixel_mask
            mask = (reduce(rows, columns) | shared_tokens)[:, None]
            self._masks[rows, columns] = mask
        return mask

    def bias(self, rows: int, columns: int, dtype: torch.dtype) -> Float[Tensor, "b 1 positions l"]:
        """Return the additive mask: 0 where :meth:`mask` is True, else minus infinity."""
        bias = self._biases.get((rows, columns, dtype))
        if bias is None:
            mask = self.mask(rows, columns)
            tokens = mask.shape[-1]
            stored = -(-tokens // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
            buffer = mask.new_zeros((*mask.shape[:-1], stored), dtype=dtype)
            bias = buffer[..., :tokens].masked_fill_(~mask, float("-inf"))
            self._biases[rows, columns, dtype] = bias
        return bias

    def _nearest_mask(self, rows: int, columns: int) -> Bool[Tensor, "b positions l"]:
        cells = interpolate(self.labels[:, None].float(), size=(rows, columns), mode="nearest")
        classes = cells.flatten(1).to(self.token_classes.dtype)
        return classes[:, :, None] == self.token_classes[:, None, :]

    def _any_pixel_mask(self, rows: int, columns: int) -> Bool[Tensor, "b positions l"]:
        mask = self.token_classes.new_zeros(
            (len(self), rows * columns, self.token_classes.shape[1]), dtype=torch.bool
        )
        for index in self.token_classes.unique().tolist():
            if index >= 0:
                inside = (self.labels == index).float()[:, None]
                touched = adaptive_max_pool2d(inside, (rows, columns)).flatten(1) > 0
                mask |= touched[:, :, None] & (self.token_classes == index)[:, None, :]
        return mask


def token_grid(tokens: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of a layer's query tokens.

    A UNet halves both sides of its latents (H, W) from level to level, rounding up. If they
    divide evenly, ``rows = H * sqrt(tokens / (H * W))``.

    Args:
        tokens: Number of query tokens of the layer.
        latent: H and W of the latents.

    Raises:
        StageError: No level has that number of tokens.
    """
    rows, columns = latent
    while rows * columns > tokens and rows * columns > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != tokens:
        raise StageError(
            f"a layer has {tokens} query tokens, which matches no level of latents of size {latent}"
        )
    return rows, columns


def _signature(condition: Condition) -> Mapping[str, object]:
    return {
        "mask": condition.regions.shape,
        "tokens": condition.token_classes.shape,
        "downsampling": condition.downsampling,
    }
