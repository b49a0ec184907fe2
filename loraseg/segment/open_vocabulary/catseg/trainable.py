"""What trains, and how fast (methods A.6)."""

from typing import Any, Literal

from torch import nn

from loraseg.errors import ConfigError
from loraseg.segment.open_vocabulary.catseg.model import CATSeg

__all__ = ["freeze_clip", "parameter_groups"]

_NO_DECAY = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)


def freeze_clip(model: CATSeg, mode: Literal["attention", "frozen"] = "attention") -> None:
    """Choose what trains: aggregator and upsamplers wholly, of CLIP what ``mode`` says.

    Args:
        model: Changed in place (``requires_grad``).
        mode: "attention", the official setting: only the q and v weights (not biases) of every
            block of both encoders. "frozen": nothing of CLIP.

    Raises:
        ConfigError: The mode is unknown.
    """
    if mode not in ("attention", "frozen"):
        raise ConfigError(f"freeze mode {mode!r}: expected 'attention' or 'frozen'")
    model.requires_grad_(True)
    for name, parameter in model.clip.named_parameters():
        trains = name.endswith(("attn.q_proj.weight", "attn.v_proj.weight"))
        parameter.requires_grad_(mode == "attention" and trains)


def parameter_groups(
    model: CATSeg, *, lr: float = 2e-4, weight_decay: float = 1e-4, clip_multiplier: float = 0.01
) -> list[dict[str, Any]]:
    """Return AdamW parameter groups over the trainable parameters; empty groups are left out.

    CLIP parameters learn at ``lr * clip_multiplier``; norm layers and embeddings do not decay.
    """
    clip = {id(parameter) for parameter in model.clip.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                key = (id(parameter) in clip, not isinstance(module, _NO_DECAY))
                groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * clip_multiplier if in_clip else lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (in_clip, decays), parameters in groups.items()
    ]
