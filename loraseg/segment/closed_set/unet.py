"""A small U-Net, used for the judge and the baselines of the miniature."""

import torch
from torch import nn

from loraseg.tensor_types import Float, Tensor

__all__ = ["UNet"]


class UNet(nn.Module):
    """A U-Net (arXiv 1505.04597) with three levels, group norm and SiLU."""

    def __init__(self, classes: int, width: int = 24) -> None:
        """Initialise the weights.

        Args:
            classes: Number of classes.
            width: Channels at full resolution, a multiple of 8; doubled at each lower level.
        """
        super().__init__()
        self.down = nn.ModuleList(
            [
                _double_conv(3, width),
                _double_conv(width, 2 * width),
                _double_conv(2 * width, 4 * width),
            ]
        )
        self.up = nn.ModuleList(
            [_double_conv(3 * width, width), _double_conv(6 * width, 2 * width)]
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Return logits.

        Args:
            images: RGB in [-1, 1]; height and width must be multiples of 4.
        """
        fine = self.down[0](images)
        middle = self.down[1](nn.functional.max_pool2d(fine, 2))
        coarse = self.down[2](nn.functional.max_pool2d(middle, 2))
        middle = self.up[1](torch.cat([middle, _upsample2x(coarse)], 1))
        return self.head(self.up[0](torch.cat([fine, _upsample2x(middle)], 1)))


def _double_conv(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.GroupNorm(8, out),
        nn.SiLU(),
        nn.Conv2d(out, out, 3, padding=1, bias=False),
        nn.GroupNorm(8, out),
        nn.SiLU(),
    )


def _upsample2x(features: Tensor) -> Tensor:
    return nn.functional.interpolate(features, scale_factor=2.0, mode="nearest")
