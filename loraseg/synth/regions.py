"""Which text tokens each place of an image may look at (methods b.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import adaptive_max_pool2d, interpolate

from loraseg.errors import DatasetError, StageError
from loraseg.synth.conditioning import Condition, Downsampling
from loraseg.tensor_types import Bool, Float, Int, Tensor, UInt8

__all__ = ["Regions", "token_grid"]

# A row of the additive mask starts at a multiple of this many values; fused GPU attention would
# otherwise copy the mask into such a layout at every call.
_ROW_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """The regions of a batch of b samples, and the masks made of them, one per resolution.

    A place of class c may look at the tokens of class c and at those of no class (-1: start, end,
    padding and the words of a template). A place without a class (255) sees only the latter.

    Attributes:
        labels: (b, H, W) class ids at the masks' size; 255 where no word is meant.
        token_classes: (n, l), n = b, class id of each token, -1 for none.
        downsampling: ``nearest`` takes one pixel per cell, as ``interpolate(mode="nearest")``;
            ``max`` lets a cell see the tokens of every class that has a pixel in it, so that thin
            objects do not vanish at coarse resolutions.

    Raises:
        DatasetError: The counts differ, or a sample has no token that every place may see.
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
        blind = ~(self.token_classes == -1).any(dim=1)
        if blind.any():
            raise DatasetError(
                f"sample {int(blind.nonzero()[0])}: every token belongs to a class; expected at "
                "least one, such as the start token, that all places may see"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def stack(
        cls, conditions: Sequence[Condition], device: torch.device | str = "cpu"
    ) -> "Regions":
        """Put the conditions of several samples into one batch.

        Raises:
            DatasetError: No conditions, or their masks, tokens or downsampling differ.
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
            torch.stack([torch.from_numpy(one.regions) for one in conditions]).to(device),
            torch.stack([torch.from_numpy(one.token_classes) for one in conditions]).to(device),
            first.downsampling,
        )

    def mask(self, rows: int, columns: int) -> Bool[Tensor, "b 1 places l"]:
        """Return True where a place of the (rows, columns) grid may look at a token."""
        known = self._masks.get((rows, columns))
        if known is None:
            open_tokens = (self.token_classes == -1)[:, None, :]
            seen = self._nearest_mask if self.downsampling == "nearest" else self._any_pixel_mask
            known = (seen(rows, columns) | open_tokens)[:, None]
            self._masks[rows, columns] = known
        return known

    def bias(self, rows: int, columns: int, dtype: torch.dtype) -> Float[Tensor, "b 1 places l"]:
        """Return 0 where :meth:`mask` is True, else minus infinity: what is added to scores."""
        known = self._biases.get((rows, columns, dtype))
        if known is None:
            mask = self.mask(rows, columns)
            tokens = mask.shape[-1]
            stored = -(-tokens // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
            room = mask.new_zeros((*mask.shape[:-1], stored), dtype=dtype)
            known = room[..., :tokens].masked_fill_(~mask, float("-inf"))
            self._biases[rows, columns, dtype] = known
        return known

    def _nearest_mask(self, rows: int, columns: int) -> Bool[Tensor, "b places l"]:
        cells = interpolate(self.labels[:, None].float(), size=(rows, columns), mode="nearest")
        classes = cells.flatten(1).to(self.token_classes.dtype)
        return classes[:, :, None] == self.token_classes[:, None, :]

    def _any_pixel_mask(self, rows: int, columns: int) -> Bool[Tensor, "b places l"]:
        places = self.token_classes.new_zeros(
            (len(self), rows * columns, self.token_classes.shape[1]), dtype=torch.bool
        )
        for one in self.token_classes.unique().tolist():
            if one >= 0:
                inside = (self.labels == one).float()[:, None]
                touched = adaptive_max_pool2d(inside, (rows, columns)).flatten(1) > 0
                places |= touched[:, :, None] & (self.token_classes == one)[:, None, :]
        return places


def token_grid(tokens: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of a layer's query tokens.

    A UNet halves both sides of its latents (H, W) from level to level, rounding up. Where they
    divide evenly that is ``rows = H * sqrt(places / (H * W))`` (methods b.1).

    Raises:
        StageError: No level has that many places.
    """
    rows, columns = latent
    while rows * columns > tokens and rows * columns > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != tokens:
        raise StageError(
            f"a layer has {tokens} query tokens, which is no level of latents of the size {latent}"
        )
    return rows, columns


def _signature(condition: Condition) -> Mapping[str, object]:
    return {
        "mask": condition.regions.shape,
        "tokens": condition.token_classes.shape,
        "downsampling": condition.downsampling,
    }
