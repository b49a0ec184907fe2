"""The key layout of official checkpoints, to and fro (methods A.8)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraseg.errors import IntegrityError
from loraseg.segment.open_vocabulary.catseg.model import CATSeg

__all__ = ["check_keys", "from_official", "official_state_dict"]

_PARTS = ("q", "k", "v")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename official keys to ours, split the fused biases, drop masks; no tensor is copied."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        if last == "in_proj_bias":
            for part, bias in zip(_PARTS, value.chunk(3), strict=True):
                ours[f"{stem}.{part}_proj.bias"] = bias
        elif last.endswith("_proj_weight"):
            ours[f"{stem}.{last.removesuffix('_weight')}.weight"] = value
        elif last != "attn_mask":
            ours[key] = value
    return ours


def official_state_dict(model: CATSeg) -> dict[str, Tensor]:
    """Return the model's tensors under the official keys, fused biases and masks included."""
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
    """Compare key by key and name every kind of difference at once.

    Raises:
        IntegrityError: Keys are missing, unknown or of another shape.
    """
    missing = sorted(expected.keys() - got.keys())
    unknown = sorted(got.keys() - expected.keys())
    shaped = [
        f"{key} got {got[key]} expected {expected[key]}"
        for key in sorted(got.keys() & expected.keys())
        if got[key] != expected[key]
    ]
    kinds = {"missing": missing, "unknown": unknown, "mis-shaped": shaped}
    problems = [
        f"{len(found)} {kind}: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"
        for kind, found in kinds.items()
        if found
    ]
    if problems:
        raise IntegrityError(f"{where}: keys do not fit CAT-Seg: {'; '.join(problems)}")
