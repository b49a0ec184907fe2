"""Segmenters with a fixed list of classes behind one interface (methods b.6).

The networks themselves are kept by others: DeepLabV3+ by segmentation_models_pytorch, Mask2Former
by transformers. What differs between them (the pixels they expect, the sizes they take, their
losses, which part is the pretrained backbone) is settled here once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraseg.compat import prepare_torchvision
from loraseg.data.labels import IGNORE
from loraseg.errors import ConfigError
from loraseg.segment.closed_set.mask_former import Mask2Former, build_mask2former
from loraseg.segment.closed_set.unet import UNet
from loraseg.tensor_types import Float, Int, UInt8

__all__ = ["NETWORKS", "ClosedSetNetwork", "NetworkConfig", "build_network"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101")
_MAX_WIDTH = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Which network; all that is needed to build it besides its classes.

    Attributes:
        name: One of :data:`NAMES`.
        width: Channels at full resolution of the U-Net (24), of DeepLabV3+'s decoder (256) or of
            Mask2Former's queries (256); a multiple of 8, of Mask2Former's 32. None is the number
            in brackets.
        backbone: ``resnet18`` to ``resnet101``, or ``swin-t``, ``swin-s``, ``swin-b``, ``swin-l``,
            ``swin-nano``; None is the one that the name tells. The U-Net has none.

    Raises:
        ConfigError: A value is out of range, or no such backbone goes with the network.
    """

    name: Literal["unet-small", "deeplabv3plus-r101", "mask2former-swin-b"] = "unet-small"
    width: int | None = None
    backbone: str | None = None

    def __post_init__(self) -> None:
        if self.name not in NETWORKS:
            raise ConfigError(f"network {self.name!r}; known: {', '.join(NETWORKS)}")
        unit, known = NETWORKS[self.name].width_multiple, NETWORKS[self.name].backbones
        if self.width is not None and self.width not in range(unit, _MAX_WIDTH + 1, unit):
            raise ConfigError(
                f"{self.name}: width {self.width}; expected a multiple of {unit} to {_MAX_WIDTH}"
            )
        if self.backbone is not None and self.backbone not in known:
            raise ConfigError(
                f"{self.name}: backbone {self.backbone!r}; known: {', '.join(known) or 'none'}"
            )


@dataclass(frozen=True, slots=True)
class _NetworkSpec:
    """What differs between the networks.

    Attributes:
        build: Makes the body of (classes, width, backbone).
        mean: Subtracted from pixels in [0, 1]; one value a channel.
        std: Divides them then.
        stride: Sides are padded to multiples of it.
        default_width: The usual one.
        width_multiple: Widths are multiples of it.
        backbones: Names of backbones, the usual one first.
        backbone_prefix: Prefix of the backbone's parameters in the body; "" if there is none.
    """

    build: Callable[[int, int, str], nn.Module]
    mean: Sequence[float]
    std: Sequence[float]
    stride: int
    default_width: int
    width_multiple: int
    backbones: tuple[str, ...]
    backbone_prefix: str


class ClosedSetNetwork(nn.Module):
    """A segmenter of ``classes`` classes on images of any size.

    Attributes:
        config: What it was built from.
        classes: How many classes.
        body: The network itself; its ``state_dict`` has the keys of the library it comes from.
    """

    def __init__(self, config: NetworkConfig, classes: int) -> None:
        super().__init__()
        kind = NETWORKS[config.name]
        backbone = config.backbone or next(iter(kind.backbones), "")
        self.config, self.classes = config, classes
        self.body = kind.build(classes, config.width or kind.default_width, backbone)
        self._spec = kind

    def normalise(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
        """Return pixels as the network expects them, on its device and in its precision."""
        parameter = next(self.parameters())
        # In float32, whatever the network computes in: eight bits do not fit into bfloat16.
        pixels = images.to(parameter.device).permute(0, 3, 1, 2).float() / 255
        mean = torch.tensor(self._spec.mean, device=parameter.device)[:, None, None]
        std = torch.tensor(self._spec.std, device=parameter.device)[:, None, None]
        return ((pixels - mean) / std).to(parameter.dtype)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Return logits at the size of the images.

        Args:
            images: From :meth:`normalise`; any height and width.

        Returns:
            Numbers whose softmax over the classes is their probability. Those of Mask2Former are
            the logarithm of its semantic map, normalised to sum to one.
        """
        height, width = images.shape[-2:]
        return self.body(self._pad(images))[..., :height, :width]

    def loss(
        self,
        images: Float[Tensor, "b 3 h w"],
        targets: Int[Tensor, "b h w"],
        weights: Float[Tensor, " c"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss that the network is trained with, a mean over the batch.

        Args:
            images: From :meth:`normalise`.
            targets: int64 class ids; 255 counts nowhere.
            weights: Of the classes, or None for equal ones. In Mask2Former they weigh the
                classification of the queries.
        """
        if isinstance(self.body, Mask2Former):
            padded = self._pad(images)
            bottom, right = (padded.shape[i] - images.shape[i] for i in (-2, -1))
            targets = functional.pad(targets, (0, right, 0, bottom), value=IGNORE)
            return self.body.loss(padded, targets, weights)
        logits = self(images).float()
        # Divided by hand: the mean of no pixel at all is not a number, and its gradient neither.
        total = functional.cross_entropy(
            logits, targets, weights, ignore_index=IGNORE, reduction="sum"
        )
        counted = targets != IGNORE
        if weights is None:
            return total / counted.sum().clamp(min=1)
        share = weights[torch.where(counted, targets, 0)] * counted
        return total / share.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def parameter_groups(self, rate: float, head_factor: float = 1.0) -> list[dict[str, Any]]:
        """Return groups for an optimiser: the backbone at ``rate``, all else ``head_factor`` times.

        Norms and embeddings of Mask2Former do not decay, as in its authors' recipe. A network
        without backbone learns at ``rate`` as a whole.

        Args:
            rate: Learning rate of the backbone.
            head_factor: What the rest learns faster by.
        """
        still = self._no_decay_names() if isinstance(self.body, Mask2Former) else set()
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.body.named_parameters():
            head = self._spec.backbone_prefix and not name.startswith(self._spec.backbone_prefix)
            key = (rate * head_factor if head else rate, name in still)
            groups.setdefault(key, []).append(parameter)
        return [
            {"params": members, "lr": lr, **({"weight_decay": 0.0} if bare else {})}
            for (lr, bare), members in groups.items()
        ]

    def backbone_prefix(self) -> str:
        """Return what the names of the backbone's parameters in ``body`` start with."""
        return self._spec.backbone_prefix

    def _pad(self, images: Tensor) -> Tensor:
        bottom, right = (-side % self._spec.stride for side in images.shape[-2:])
        if not bottom and not right:
            return images
        # The edge goes on: black would be an object to a network, and mirroring needs big images.
        return functional.pad(images, (0, right, 0, bottom), mode="replicate")

    def _no_decay_names(self) -> set[str]:
        names: set[str] = set()
        for prefix, module in self.body.named_modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Embedding):
                names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        return names | {n for n, _ in self.body.named_parameters() if n.endswith("_bias_table")}


def build_network(config: NetworkConfig, classes: int) -> ClosedSetNetwork:
    """Make a network with fresh weights, drawn from torch's global generator; nothing is fetched.

    Raises:
        ConfigError: The number of classes is out of range.
    """
    if not 1 <= classes <= IGNORE:
        raise ConfigError(f"{classes} classes: expected 1 to {IGNORE}")
    return ClosedSetNetwork(config, classes)


def _build_unet(classes: int, width: int, backbone: str) -> nn.Module:
    del backbone
    return UNet(classes, width)


def _build_deeplab(classes: int, width: int, backbone: str) -> nn.Module:
    prepare_torchvision()
    import segmentation_models_pytorch

    # Output stride 16, as UniMatch's DeepLabV3+ (methods b.6).
    return segmentation_models_pytorch.DeepLabV3Plus(
        backbone, encoder_weights=None, decoder_channels=width, classes=classes
    )


NETWORKS: Mapping[str, _NetworkSpec] = {
    "unet-small": _NetworkSpec(_build_unet, (0.5,) * 3, (0.5,) * 3, 4, 24, 8, (), ""),
    "deeplabv3plus-r101": _NetworkSpec(
        _build_deeplab, *_IMAGENET, 16, 256, 8, _ENCODERS[::-1], "encoder."
    ),
    "mask2former-swin-b": _NetworkSpec(
        build_mask2former,
        *_IMAGENET,
        32,
        256,
        32,
        ("swin-b", "swin-l", "swin-s", "swin-t", "swin-nano"),
        "network.model.pixel_level_module.encoder.",
    ),
}
