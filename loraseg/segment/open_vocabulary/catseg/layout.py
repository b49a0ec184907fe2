"""Conversion of state dicts from and to the keys of official checkpoints."""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraseg.errors import IntegrityError
from loraseg.segment.open_vocabulary.catseg.model import CATSeg

__all__ = ["check_keys", "from_official", "official_state_dict"]

_PARTS = ("q", "k", "v")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of :class:`CATSeg` from official keys, without copying tensors.

    Fused biases (3 c,) become three of (c,), masks (m, n, n) are dropped, and other tensors keep
    their shapes.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        if last == "in_proj_bias":
            for part, bias in zip(_PARTS, value.chunk(3), strict=True):
                converted[f"{stem}.{part}_proj.bias"] = bias
        elif last.endswith("_proj_weight"):
            converted[f"{stem}.{last.removesuffix('_weight')}.weight"] = value
        elif last != "attn_mask":
            converted[key] = value
    return converted


def official_state_dict(model: CATSeg) -> dict[str, Tensor]:
    """Return the tensors of a model under the official keys, the inverse of :func:`from_official`.

    Biases are fused to shape (3 c,), and masks (m, n, n) are included.
    """
    state = dict(model.state_dict())
    official: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        owner, _, module = stem.rpartition(".")
        if module not in ("q_proj", "k_proj", "v_proj"):
            official[key] = value
        elif last == "weight":
            official[f"{owner}.{module}_weight"] = value
        elif module == "q_proj":
            biases = [state[f"{owner}.{part}_proj.bias"] for part in _PARTS]
            official[f"{owner}.in_proj_bias"] = torch.cat(biases)
    for key, value in model.named_buffers():
        if key.endswith("attn_mask"):
            official[key] = value
    return official


def check_keys(
    got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare the shapes of two state dicts by key and report all differences.

    Raises:
        IntegrityError: Keys are missing, unknown or have another shape.
    """
    missing = sorted(expected.keys() - got.keys())
    unknown = sorted(got.keys() - expected.keys())
    mis_shaped = [
        f"{key} got {got[key]} expected {expected[key]}"
        for key in sorted(got.keys() & expected.keys())
        if got[key] != expected[key]
    ]
    kinds = {"missing": missing, "unknown": unknown, "mis-shaped": mis_shaped}
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
        for kind, keys in kinds.items()
        if keys
    ]
    if problems:
        raise IntegrityError(f"{where}: keys do not fit CAT-Seg: {'; '.join(problems)}")
