"""The per-class upsampling decoder of CAT-Seg."""

from typing import Any

import torch
from torch import Tensor, nn

from loraseg.tensor_types import Float

__all__ = ["Up"]


class ChannelNorm(nn.GroupNorm):
    """Group norm with groups of 16 channels; one group if there are fewer channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(max(1, channels // 16), channels)

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:  # noqa: A002 - torch's name
        # The channels_last kernel on the CPU is ten times slower below 16 channels.
        slow = self.num_channels < 16 and input.dtype == torch.bfloat16
        if slow and input.device.type == "cpu":
            input = input.contiguous()  # noqa: A001
        return super().forward(input)


class DoubleConv(nn.Module):
    """Two times: 3x3 convolution without bias, group norm, ReLU."""

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
        """Return the kernel of the first convolution, which :class:`Up` applies."""
        first: Any = self.double_conv[0]
        return first.weight

    def forward(self, x: Float[Tensor, "n o h w"]) -> Float[Tensor, "n o h w"]:
        """Run the layers after the first convolution."""
        return self.double_conv[1:](x)


class Up(nn.Module):
    """Double the side, concatenate the image's guidance to every class map, convolve.

    Official code: ``cat_seg/modeling/transformer/model.py``, ``Up``. Upsampling and the first 3x3
    convolution have no nonlinearity between them and are folded into one transposed convolution.
    The contribution of the guidance and of the upsampling's bias is the same for all classes of an
    image and is computed once.
    """

    def __init__(self, inputs: int, outputs: int, guidance_dim: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs - guidance_dim, 2, 2)
        self.conv = DoubleConv(inputs, outputs)

    def fold(
        self, guidance: Float[Tensor, "b a g2 g2"]
    ) -> tuple[Float[Tensor, "c c2 4 4"], Float[Tensor, "b 1 c2 g2 g2"]]:
        """Return the folded kernel and the convolved guidance, which all classes share."""
        widths = [self.up.out_channels, guidance.shape[1]]
        map_weight, guidance_weight = self.conv.first_weight().split(widths, 1)
        # Tap a of the upsampling and tap u of the convolution give tap a - u + 2 of four.
        kernel = nn.functional.conv2d(self.up.weight, map_weight, padding=2)
        return kernel, self._convolve_guidance(guidance, map_weight, guidance_weight)

    def forward(
        self, x: Float[Tensor, "bt c g g"], folded: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "bt c2 g2 g2"]:
        """Decode maps of a chunk of classes of every image.

        Args:
            x: The maps, with images as the outer part of the first axis.
            folded: The result of :meth:`fold` for the guidance of the images.
        """
        kernel, guidance = folded
        maps = nn.functional.conv_transpose2d(x, kernel, stride=2, padding=1)
        maps = maps.unflatten(0, (len(guidance), -1)).add_(guidance)
        return self.conv(maps.flatten(0, 1))

    def _convolve_guidance(
        self, guidance: Tensor, map_weight: Tensor, guidance_weight: Tensor
    ) -> Float[Tensor, "b 1 c2 g2 g2"]:
        """Convolve the guidance, with the upsampling's bias as an additional channel of ones."""
        assert self.up.bias is not None
        bias = (map_weight * self.up.bias[:, None, None]).sum(dim=1, keepdim=True)
        ones = guidance.new_ones(1, 1, *guidance.shape[2:]).expand(len(guidance), -1, -1, -1)
        weight = torch.cat([guidance_weight, bias], dim=1)
        return nn.functional.conv2d(torch.cat([guidance, ones], dim=1), weight, padding=1)[:, None]
