"""Mask2Former (arXiv 2112.01527) with class logits as output, based on transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraseg.compat import prepare_torchvision
from loraseg.segment.closed_set.mask_loss import set_loss
from loraseg.tensor_types import Float, Int

__all__ = ["Mask2Former", "build_mask2former"]

# Channels, blocks per stage, attention window, image size and channels per head of the pretrained
# Swin transformers; the last one is for tests. Drop path as in Mask2Former's configs.
_SWIN_VARIANTS = {
    "swin-t": (96, (2, 2, 6, 2), 7, 224, 32),
    "swin-s": (96, (2, 2, 18, 2), 7, 224, 32),
    "swin-b": (128, (2, 2, 18, 2), 12, 384, 32),
    "swin-l": (192, (2, 2, 18, 2), 12, 384, 32),
    "swin-nano": (16, (1, 1, 1, 1), 4, 64, 8),
}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]


class Mask2Former(nn.Module):
    """Combines the masks of the queries into one map per class.

    Attributes:
        network: ``Mask2FormerForUniversalSegmentation`` of transformers.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """Return ``log(S_c / sum S)`` with ``S_c = sum_q softmax(class)_qc sigmoid(mask_q)``.

        Masks are resized to the image before the sigmoid, as in Mask2Former's semantic inference
        (``mask2former/maskformer_model.py``, ``MaskFormer.semantic_inference``).
        """
        out = self.network(pixel_values=images)
        probabilities = out.class_queries_logits.float().softmax(-1)[..., :-1]
        maps: list[Tensor] = []
        # One image at a time limits memory: each has a hundred full-size masks.
        for probability, masks in zip(probabilities, out.masks_queries_logits.float(), strict=True):
            resized = functional.interpolate(
                masks[None], images.shape[-2:], mode="bilinear", align_corners=False
            )[0]
            semantic = torch.einsum("qc,qhw->chw", probability, resized.sigmoid())
            tiny = torch.finfo(semantic.dtype).tiny
            maps.append(semantic.clamp(min=tiny).log().log_softmax(0))
        return torch.stack(maps)

    def loss(
        self,
        images: Float[Tensor, "b 3 h w"],
        targets: Int[Tensor, "b h w"],
        weights: Float[Tensor, " c"] | None,
    ) -> Float[Tensor, ""]:
        """Return the set loss over the classes in each image, see :mod:`mask_loss`."""
        out = self.network(pixel_values=images, output_auxiliary_logits=True)
        layers = [(out.class_queries_logits, out.masks_queries_logits)]
        layers += [
            (layer["class_queries_logits"], layer["masks_queries_logits"])
            for layer in out.auxiliary_logits
        ]
        # The last weight is that of "no object".
        class_weights = self.network.criterion.empty_weight
        if weights is not None:
            class_weights = torch.cat([weights.to(class_weights.dtype), class_weights[-1:]])
        with torch.autocast(images.device.type, enabled=False):
            return set_loss(layers, targets, class_weights.float(), self.network.config)


def build_mask2former(classes: int, width: int, backbone: str) -> Mask2Former:
    """Build a Mask2Former with randomly initialised weights.

    Args:
        classes: Number of classes.
        width: Width of the queries; the feed-forward layers are four and eight times as wide.
        backbone: ``swin-t``, ``swin-s``, ``swin-b``, ``swin-l``, or ``swin-nano`` for tests.
    """
    prepare_torchvision()
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    # Keywords of the base class, which pyright does not know.
    base_kwargs: dict[str, Any] = {"num_labels": classes}
    config = Mask2FormerConfig(
        **base_kwargs,
        backbone_config=_swin_config(backbone),
        feature_size=width,
        mask_feature_size=width,
        hidden_dim=width,
        encoder_feedforward_dim=4 * width,
        dim_feedforward=8 * width,
    )
    network = Mask2FormerForUniversalSegmentation(config)
    for name, parameter in network.named_parameters():
        # Swin's last norm is unused in a backbone; DistributedDataParallel would wait for it.
        if name.endswith(("encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias")):
            parameter.requires_grad_(False)
    return Mask2Former(network)


def _swin_config(name: str) -> Any:
    from transformers import SwinConfig

    channels, depths, window, size, head = _SWIN_VARIANTS[name]
    base_kwargs: dict[str, Any] = {"out_features": _STAGES}
    return SwinConfig(
        **base_kwargs,
        embed_dim=channels,
        depths=list(depths),
        num_heads=[channels * 2**stage // head for stage in range(4)],
        window_size=window,
        image_size=size,
        drop_path_rate=0.3,
    )
