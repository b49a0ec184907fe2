"""The linear layers of a CAT-Seg that adapters are applied to."""

import re
from collections.abc import Mapping

from torch import nn

from loraseg.errors import AdapterMismatchError, ConfigError

__all__ = ["TARGET_RULES", "target_modules"]

_CLIP_BLOCK = r"resblocks\.\d+\.(?:mlp\.(?:c_fc|c_proj)|attn\.[qkv]_proj)"
_SWIN_BLOCK = r"swin_block\.block_[12]\.(?:attn\.(?:q|k|v|proj)|mlp\.fc[12])"
_CLASS_ATTENTION = r"attention\.(?:attention\.[qkv]|MLP\.[02])"
TARGET_RULES: Mapping[str, str] = {
    # SemLA's targets (the ``target_modules`` of its published adapter_config.json): both CLIP
    # towers and the aggregator, without out_proj, convolutions, projections, upsamplers and
    # decoder.
    "semla": (
        r"sem_seg_head\.predictor\.(?:"
        rf"clip_model\.(?:visual\.)?transformer\.{_CLIP_BLOCK}"
        rf"|transformer\.layers\.\d+\.(?:{_SWIN_BLOCK}|{_CLASS_ATTENTION}))"
    ),
    # Without CLIP: its features stay those of the base, and training does not differentiate it.
    "aggregator": (
        rf"sem_seg_head\.predictor\.transformer\.layers\.\d+\."
        rf"(?:{_SWIN_BLOCK}|{_CLASS_ATTENTION})"
    ),
}


def target_modules(model: nn.Module, rule: str = "semla") -> tuple[str, ...]:
    """Return the full dotted names of the linear layers that a rule adapts, in model order.

    Args:
        model: A CAT-Seg of any depth and width.
        rule: A key of :data:`TARGET_RULES`.

    Raises:
        ConfigError: The rule is unknown.
        AdapterMismatchError: The rule matches no layer of the model.
    """
    if rule not in TARGET_RULES:
        raise ConfigError(f"targets: unknown rule {rule!r} (known: {', '.join(TARGET_RULES)})")
    pattern = re.compile(TARGET_RULES[rule])
    names = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.fullmatch(name)
    )
    if not names:
        raise AdapterMismatchError(
            f"rule {rule!r} matches no linear layer of {type(model).__name__}; expected a CAT-Seg"
        )
    return names
