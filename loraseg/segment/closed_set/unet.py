"""A small U-Net with a fixed list of classes, for worlds where a large segmenter would be a waste.

Pretraining's judge and the baselines of the miniature use it; it knows nothing of adapters.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from loraseg.errors import IntegrityError
from loraseg.storage.safetensors_io import encode_safetensors
from loraseg.tensor_types import Float, Tensor, UInt8, ndarray

__all__ = ["UNet", "encode_unet", "load_unet", "predict_labels"]

_PREDICT_BATCH = 64


class UNet(nn.Module):
    """Three levels of convolutions with group norm; (b, 3, h, w) in [-1, 1] to class logits."""

    def __init__(self, classes: int, width: int = 24) -> None:
        """Make a fresh network.

        Args:
            classes: Logits a pixel.
            width: Channels at full resolution; twice and four times as many below. A multiple of 8.
        """
        super().__init__()
        self.classes, self.width = classes, width
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
        """Return logits; height and width must be multiples of 4."""
        fine = self.down[0](images)
        middle = self.down[1](nn.functional.max_pool2d(fine, 2))
        coarse = self.down[2](nn.functional.max_pool2d(middle, 2))
        middle = self.up[1](torch.cat([middle, _upsample2x(coarse)], 1))
        return self.head(self.up[0](torch.cat([fine, _upsample2x(middle)], 1)))


def predict_labels(model: UNet, images: UInt8[ndarray, "n h w 3"]) -> UInt8[ndarray, "n h w"]:
    """Return the likeliest class of each pixel."""
    parameter = next(model.parameters())
    labels: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, len(images), _PREDICT_BATCH):
            part = torch.from_numpy(images[start : start + _PREDICT_BATCH]).to(parameter.device)
            logits = model(part.permute(0, 3, 1, 2).to(parameter.dtype) / 127.5 - 1)
            labels.append(logits.argmax(1).byte().cpu())
    return torch.cat(labels).numpy()


def encode_unet(model: UNet, class_names: Sequence[str]) -> bytes:
    """Return a safetensors file of the weights in float16; equal models give equal bytes."""
    header = {"classes": json.dumps(list(class_names)), "width": str(model.width)}
    return encode_safetensors({k: v.half() for k, v in model.state_dict().items()}, header)


def load_unet(path: Path) -> tuple[UNet, tuple[str, ...]]:
    """Read what :func:`unet_bytes` wrote: the network in float32, frozen, and its class names.

    Raises:
        IntegrityError: The file is no such network.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata()
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        names = _names(header["classes"])
        # Without memory: what a header claims is cheap, what the file holds must fit it.
        with torch.device("meta"):
            model = UNet(len(names), int(header["width"]))
        model.load_state_dict(state, assign=True)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"{path}: not a small U-Net: {str(error)[:300]}") from error
    wrong = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if wrong:
        raise IntegrityError(f"{path}: {wrong[0]} has values that are not finite")
    return model.eval().requires_grad_(False), names


def _names(text: str) -> tuple[str, ...]:
    names = json.loads(text)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"classes {text[:80]!r}, expected a list of names")
    return tuple(names)


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
