"""Trainable parameters of CAT-Seg and their learning rates.

Official code: ``cat_seg/modeling/transformer/cat_seg_predictor.py``, ``CATSegPredictor.__init__``
(frozen parameters), and ``train_net.py``, ``Trainer.build_optimizer`` (learning rates).
"""

from typing import Any, Literal

from torch import nn

from loraseg.errors import ConfigError
from loraseg.segment.open_vocabulary.catseg.model import CATSeg

__all__ = ["freeze_clip", "parameter_groups"]

_NO_DECAY = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)


def freeze_clip(model: CATSeg, mode: Literal["attention", "frozen"] = "attention") -> None:
    """Make the aggregator and the upsamplers trainable, and parts of CLIP according to ``mode``.

    Args:
        model: The model; its ``requires_grad`` flags are changed in place.
        mode: "attention", the official setting: the q and v weights (not biases) of every block of
            both encoders are trained. "frozen": no parameter of CLIP is trained.

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
    """Return AdamW parameter groups of the trainable parameters; empty groups are left out.

    The learning rate of CLIP is ``lr * clip_multiplier``; norm layers and embeddings have no weight
    decay.
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
