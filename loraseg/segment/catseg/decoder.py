"""The per-class upsampling decoder (methods A.5, step 6)."""

import torch
from torch import Tensor, nn

from loraseg.tensor_types import Float

__all__ = ["Up"]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // 16), channels)


class DoubleConv(nn.Module):
    """Twice: 3x3 convolution without bias, group norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            _group_norm(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            _group_norm(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    """Double the side, append the image's guidance to every class, convolve."""

    def __init__(self, inputs: int, outputs: int, guidance_dim: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs - guidance_dim, 2, 2)
        self.conv = DoubleConv(inputs, outputs)

    def forward(
        self, x: Float[Tensor, "bt c g g"], guidance: Float[Tensor, "b a g2 g2"]
    ) -> Float[Tensor, "bt c2 g2 g2"]:
        """Decode the maps of every class of every image, images outermost."""
        maps = self.up(x).unflatten(0, (len(guidance), -1))
        spread = guidance[:, None].expand(-1, maps.shape[1], -1, -1, -1)
        return self.conv(torch.cat([maps, spread], dim=2).flatten(0, 1))
