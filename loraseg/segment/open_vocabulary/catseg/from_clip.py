"""Build a CAT-Seg from a CLIP of open_clip."""

from collections.abc import Mapping

from torch import Tensor, nn

from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.layout import check_keys
from loraseg.segment.open_vocabulary.catseg.model import CATSeg

__all__ = ["catseg_from_clip"]


def catseg_from_clip(clip_model: nn.Module, config: CATSegConfig) -> CATSeg:
    """Build a CAT-Seg with the weights of ``clip_model``; other parameters are initialised.

    Args:
        clip_model: An ``open_clip.CLIP``; its weights are copied.
        config: Sizes of the model; those of CLIP must agree, except for ``image_size``.

    Raises:
        IntegrityError: A tensor is missing, unknown or has a shape that does not fit the config.
    """
    model = CATSeg(config)
    state = split_attention(clip_model.state_dict())
    check_keys(
        {key: tuple(value.shape) for key, value in state.items()},
        {key: tuple(value.shape) for key, value in model.clip.state_dict().items()},
        "CLIP model",
    )
    model.clip.load_state_dict(state)
    return model


def split_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split ``in_proj_weight`` (3 c, c) and ``in_proj_bias`` (3 c,) into q, k and v.

    The causal mask is dropped; other tensors are passed through.
    """
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        if last in ("in_proj_weight", "in_proj_bias"):
            kind = last.removeprefix("in_proj_")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                split[f"{stem}.{part}_proj.{kind}"] = rows
        elif key != "attn_mask":
            split[key] = value
    return split
