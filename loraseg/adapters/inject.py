"""Which layers an adapter goes into, and how a mix acts on a model without touching its weights."""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F  # noqa: N812 - the name that everybody uses
from torch import nn

from loraseg.adapters.adapter import Adapter, Mix
from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.tensor_types import Tensor

__all__ = ["TARGET_RULES", "AdapterSlots", "targets"]

_BLOCK = r"resblocks\.\d+\.(?:mlp\.(?:c_fc|c_proj)|attn\.[qkv]_proj)"
_SWIN = r"swin_block\.block_[12]\.(?:attn\.(?:q|k|v|proj)|mlp\.fc[12])"
_CLASS = r"attention\.(?:attention\.[qkv]|MLP\.[02])"
TARGET_RULES: Mapping[str, str] = {
    # Methods B.1: both CLIP towers and the aggregator; not out_proj, convolutions, projections,
    # upsamplers or the decoder.
    "semla": (
        r"sem_seg_head\.predictor\.(?:"
        rf"clip_model\.(?:visual\.)?transformer\.{_BLOCK}"
        rf"|transformer\.layers\.\d+\.(?:{_SWIN}|{_CLASS}))"
    ),
}


def targets(model: nn.Module, rule: str = "semla") -> tuple[str, ...]:
    """Return the full dotted names of the linear layers that a rule adapts, in model order.

    Args:
        model: A CAT-Seg of any depth and width.
        rule: A key of :data:`TARGET_RULES`.

    Raises:
        ConfigError: There is no such rule.
        AdapterMismatchError: The model has no layer that the rule names.
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
            f"rule {rule!r} names no linear layer of {type(model).__name__}; expected a CAT-Seg"
        )
    return names


class AdapterSlots:
    """The places of a model where adapters plug in; the base weights are never written.

    A layer's output gains ``x @ down.T @ up.T`` through a forward hook while a mix is in use, so
    leaving it gives back the base bit by bit. For one thread per model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._linears = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        self._in_use = False

    @contextmanager
    def use(self, mix: Mix | Adapter | None) -> Generator[None, None, None]:
        """Let a mix or one adapter act within the ``with`` block; None leaves the base alone.

        Raises:
            AdapterMismatchError: A module is unknown or has another size, or the adapter is more
                than its pairs (DoRA, biases, whole modules).
            StageError: Another mix is in use on this model.
        """
        if self._in_use:
            raise StageError("another adapter mix is in use on this model; leave it first")
        corrections = self._corrections(mix)
        handles: list[Any] = []
        self._in_use = True
        try:
            for linear, down, up in corrections:
                handles.append(linear.register_forward_hook(_Correction(down, up)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._in_use = False

    def _corrections(self, mix: Mix | Adapter | None) -> list[tuple[nn.Linear, Tensor, Tensor]]:
        if mix is None:
            return []
        corrections: list[tuple[nn.Linear, Tensor, Tensor]] = []
        for module, (down, up) in _pairs(mix).items():
            linear = self._linears.get(module)
            if linear is None:
                raise AdapterMismatchError(
                    f"module {module!r}: the model has no linear layer of that name"
                )
            got, expected = (up.shape[0], down.shape[1]), tuple(linear.weight.shape)
            if got != expected:
                raise AdapterMismatchError(
                    f"module {module!r}: got an adapter for a weight {got}, expected {expected}"
                )
            weight = linear.weight
            corrections.append(
                (linear, down.to(weight.device, weight.dtype), up.to(weight.device, weight.dtype))
            )
        return corrections


class _Correction:
    """Forward hook of one linear layer."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        self._down, self._up = down, up

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # F.linear rather than @, so that autocast treats it like the layer itself.
        x, *guide = inputs
        hidden = F.linear(x, self._down[:, : x.shape[-1]])
        if guide:  # a guided layer: the last columns belong to what axis 1 of x shares
            hidden = hidden + F.linear(guide[0], self._down[:, x.shape[-1] :]).unsqueeze(1)
        return output + F.linear(hidden, self._up)


def _pairs(mix: Mix | Adapter) -> Mapping[str, tuple[Tensor, Tensor]]:
    if isinstance(mix, Mix):
        return mix.pairs
    reason = mix.beyond_pairs()
    if reason is not None:
        raise AdapterMismatchError(f"adapter {mix.name!r}: cannot be used, it has {reason}")
    return {name: (pair.scale * pair.down, pair.up) for name, pair in mix.pairs.items()}
