"""The per-class upsampling decoder (methods A.5, step 6)."""

from typing import Any

import torch
from torch import Tensor, nn

from loraseg.tensor_types import Float

__all__ = ["Up"]


class ChannelNorm(nn.GroupNorm):
    """Group norm in groups of 16 channels; one group if there are fewer."""

    def __init__(self, channels: int) -> None:
        super().__init__(max(1, channels // 16), channels)

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:  # noqa: A002 - torch's name
        # The CPU kernel for channels_last takes whole vectors: ten times as long below 16 channels.
        slow = self.num_channels < 16 and input.dtype == torch.bfloat16
        if slow and input.device.type == "cpu":
            input = input.contiguous()  # noqa: A001
        return super().forward(input)


class DoubleConv(nn.Module):
    """Twice: 3x3 convolution without bias, group norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            ChannelNorm(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            ChannelNorm(outputs),
            nn.ReLU(inplace=True),
        )

    def first_weight(self) -> Float[Tensor, "o i 3 3"]:
        """Return the kernel of the first convolution, which :class:`Up` applies itself."""
        first: Any = self.double_conv[0]
        return first.weight

    def forward(self, x: Float[Tensor, "n o h w"]) -> Float[Tensor, "n o h w"]:
        """Run all that follows the first convolution."""
        return self.double_conv[1:](x)


class Up(nn.Module):
    """Double the side, append the image's guidance to every class, convolve.

    Nothing bends between the upsampling and the first 3x3 convolution, so the two are one
    transposed convolution of the small map; and what that convolution makes of the guidance and of
    the upsampling's bias is the same for all classes of an image, so it is made once.
    """

    def __init__(self, inputs: int, outputs: int, guidance_dim: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs - guidance_dim, 2, 2)
        self.conv = DoubleConv(inputs, outputs)

    def fold(
        self, guidance: Float[Tensor, "b a g2 g2"]
    ) -> tuple[Float[Tensor, "c c2 4 4"], Float[Tensor, "b 1 c2 g2 g2"]]:
        """Return what all classes share: the kernel of both steps, and the guidance's part."""
        own, shared = self.conv.first_weight().split([self.up.out_channels, guidance.shape[1]], 1)
        # Tap a of the upsampling under tap u of the convolution lands on tap a - u + 2 of four.
        kernel = nn.functional.conv2d(self.up.weight, own, padding=2)
        return kernel, self._convolve_guidance(guidance, own, shared)

    def forward(
        self, x: Float[Tensor, "bt c g g"], folded: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "bt c2 g2 g2"]:
        """Decode maps of some classes of every image, images outermost.

        Args:
            x: The maps.
            folded: What :meth:`fold` made of the images' guidance.
        """
        kernel, shared = folded
        maps = nn.functional.conv_transpose2d(x, kernel, stride=2, padding=1)
        maps = maps.unflatten(0, (len(shared), -1)).add_(shared)
        return self.conv(maps.flatten(0, 1))

    def _convolve_guidance(
        self, guidance: Tensor, own: Tensor, shared: Tensor
    ) -> Float[Tensor, "b 1 c2 g2 g2"]:
        """Convolve the guidance; the bias joins it as a channel of ones that ends at the border."""
        assert self.up.bias is not None
        bias = (own * self.up.bias[:, None, None]).sum(dim=1, keepdim=True)
        ones = guidance.new_ones(1, 1, *guidance.shape[2:]).expand(len(guidance), -1, -1, -1)
        weight = torch.cat([shared, bias], dim=1)
        return nn.functional.conv2d(torch.cat([guidance, ones], dim=1), weight, padding=1)[:, None]
