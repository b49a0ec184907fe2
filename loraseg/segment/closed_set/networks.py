"""Closed-set segmentation networks behind one interface.

DeepLabV3+ comes from segmentation_models_pytorch, Mask2Former from transformers (the networks of
MatchMask's experiments, CVPR 2026). This module hides their differences: pixel normalisation,
supported sizes, losses, and which parameters are the pretrained backbone.
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
    """Everything that defines a network, except for its classes.

    Attributes:
        name: A key of :data:`NETWORKS`.
        width: Channels at full resolution of the U-Net (24), of the decoder of DeepLabV3+ (256) or
            of the queries of Mask2Former (256); a multiple of 8, or of 32 for Mask2Former. None
            for the number in brackets.
        backbone: ``resnet18`` to ``resnet101``, or ``swin-t``, ``swin-s``, ``swin-b``, ``swin-l``,
            ``swin-nano``; None for the one in the name. The U-Net has none.

    Raises:
        ConfigError: A value is out of range, or the network has no such backbone.
    """

    name: Literal["unet-small", "deeplabv3plus-r101", "mask2former-swin-b"] = "unet-small"
    width: int | None = None
    backbone: str | None = None

    def __post_init__(self) -> None:
        if self.name not in NETWORKS:
            raise ConfigError(f"network {self.name!r}; known: {', '.join(NETWORKS)}")
        multiple, backbones = NETWORKS[self.name].width_multiple, NETWORKS[self.name].backbones
        if self.width is not None and self.width not in range(multiple, _MAX_WIDTH + 1, multiple):
            raise ConfigError(
                f"{self.name}: width {self.width}; expected a multiple of {multiple} up to "
                f"{_MAX_WIDTH}"
            )
        if self.backbone is not None and self.backbone not in backbones:
            raise ConfigError(
                f"{self.name}: backbone {self.backbone!r}; known: {', '.join(backbones) or 'none'}"
            )


@dataclass(frozen=True, slots=True)
class _NetworkSpec:
    """The properties in which the networks differ.

    Attributes:
        build: Builds the body from (classes, width, backbone).
        mean: Mean of pixels in [0, 1], one value per channel.
        std: Standard deviation of pixels in [0, 1], one value per channel.
        stride: Sides are padded to multiples of this.
        default_width: Default of ``NetworkConfig.width``.
        width_multiple: Widths are multiples of this.
        backbones: Names of backbones, the default one first.
        backbone_prefix: Prefix of the backbone's parameters in the body; "" without a backbone.
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
    """A segmentation network for images of any size.

    Attributes:
        config: The config that it was built from.
        classes: Number of classes.
        body: The wrapped network; its ``state_dict`` has the keys of the library it comes from.
    """

    def __init__(self, config: NetworkConfig, classes: int) -> None:
        super().__init__()
        spec = NETWORKS[config.name]
        backbone = config.backbone or next(iter(spec.backbones), "")
        self.config, self.classes = config, classes
        self.body = spec.build(classes, config.width or spec.default_width, backbone)
        self._spec = spec

    def normalise(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
        """Return normalised pixels on the device and in the dtype of the network."""
        parameter = next(self.parameters())
        # In float32 for every dtype of the network: eight bits do not fit into bfloat16.
        pixels = images.to(parameter.device).permute(0, 3, 1, 2).float() / 255
        mean = torch.tensor(self._spec.mean, device=parameter.device)[:, None, None]
        std = torch.tensor(self._spec.std, device=parameter.device)[:, None, None]
        return ((pixels - mean) / std).to(parameter.dtype)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Return logits at the size of the images.

        Args:
            images: Pixels from :meth:`normalise`; any height and width.

        Returns:
            Logits whose softmax over the classes gives probabilities. For Mask2Former the log of
            its semantic map, normalised to sum 1.
        """
        height, width = images.shape[-2:]
        return self.body(self._pad(images))[..., :height, :width]

    def loss(
        self,
        images: Float[Tensor, "b 3 h w"],
        targets: Int[Tensor, "b h w"],
        weights: Float[Tensor, " c"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the training loss of the network, averaged over the batch.

        Args:
            images: Pixels from :meth:`normalise`.
            targets: Int64 class ids; pixels of 255 are ignored.
            weights: Class weights; None for equal ones. For Mask2Former, weights of the
                classification of queries.
        """
        if isinstance(self.body, Mask2Former):
            padded = self._pad(images)
            bottom, right = (padded.shape[i] - images.shape[i] for i in (-2, -1))
            targets = functional.pad(targets, (0, right, 0, bottom), value=IGNORE)
            return self.body.loss(padded, targets, weights)
        logits = self(images).float()
        # Explicit division: the built-in mean over no pixels is NaN, and so is its gradient.
        total = functional.cross_entropy(
            logits, targets, weights, ignore_index=IGNORE, reduction="sum"
        )
        counted = targets != IGNORE
        if weights is None:
            return total / counted.sum().clamp(min=1)
        pixel_weights = weights[torch.where(counted, targets, 0)] * counted
        return total / pixel_weights.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def parameter_groups(self, rate: float, head_factor: float = 1.0) -> list[dict[str, Any]]:
        """Return optimiser groups: the backbone at ``rate``, the rest at ``rate * head_factor``.

        Norms and embeddings of Mask2Former have no weight decay, as in its official training. All
        parameters of a network without backbone have the learning rate ``rate``.

        Args:
            rate: Learning rate of the backbone.
            head_factor: Factor of the learning rate of other parameters.
        """
        no_decay = self._no_decay_names() if isinstance(self.body, Mask2Former) else set()
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.body.named_parameters():
            head = self._spec.backbone_prefix and not name.startswith(self._spec.backbone_prefix)
            key = (rate * head_factor if head else rate, name in no_decay)
            groups.setdefault(key, []).append(parameter)
        return [
            {"params": parameters, "lr": lr, **({"weight_decay": 0.0} if undecayed else {})}
            for (lr, undecayed), parameters in groups.items()
        ]

    def backbone_prefix(self) -> str:
        """Return the prefix of the backbone's parameter names in ``body``."""
        return self._spec.backbone_prefix

    def _pad(self, images: Tensor) -> Tensor:
        bottom, right = (-side % self._spec.stride for side in images.shape[-2:])
        if not bottom and not right:
            return images
        # Replication: black could look like an object, and reflection needs larger images.
        return functional.pad(images, (0, right, 0, bottom), mode="replicate")

    def _no_decay_names(self) -> set[str]:
        names: set[str] = set()
        for prefix, module in self.body.named_modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.Embedding):
                names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        return names | {n for n, _ in self.body.named_parameters() if n.endswith("_bias_table")}


def build_network(config: NetworkConfig, classes: int) -> ClosedSetNetwork:
    """Build a network with weights drawn from torch's global generator; nothing is downloaded.

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

    # Output stride 16, as in UniMatch (arXiv 2208.09910), whose VOC setting MatchMask uses.
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
