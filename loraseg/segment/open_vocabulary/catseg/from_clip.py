"""A CAT-Seg around a CLIP of open_clip."""

from collections.abc import Mapping

from torch import Tensor, nn

from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.layout import check_keys
from loraseg.segment.open_vocabulary.catseg.model import CATSeg

__all__ = ["catseg_from_clip"]


def catseg_from_clip(clip_model: nn.Module, config: CATSegConfig) -> CATSeg:
    """Build a CAT-Seg whose CLIP has the weights of ``clip_model``; the rest is initialised.

    Args:
        clip_model: An ``open_clip.CLIP``; copied, not shared.
        config: Must agree with the CLIP's sizes; ``image_size`` may be another one.

    Raises:
        IntegrityError: A tensor is missing, unknown or of another shape than the config says.
    """
    model = CATSeg(config)
    state = split_attention(clip_model.state_dict())
    own = model.clip.state_dict()
    check_keys(
        {key: tuple(value.shape) for key, value in state.items()},
        {key: tuple(value.shape) for key, value in own.items()},
        "CLIP model",
    )
    model.clip.load_state_dict(state)
    return model


def split_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split ``in_proj_weight`` and ``in_proj_bias`` into q, k and v; drop the causal mask."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        if last in ("in_proj_weight", "in_proj_bias"):
            kind = last.removeprefix("in_proj_")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                ours[f"{stem}.{part}_proj.{kind}"] = rows
        elif key != "attn_mask":
            ours[key] = value
    return ours
