"""Sizes of the smallest CAT-Seg that has all parts."""

from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig

_SIZES = {
    "image_size": 16,
    "patch": 4,
    "position_grid": 4,
    "vision_width": 16,
    "vision_layers": 2,
    "vision_heads": 2,
    "embed_dim": 12,
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
    "context_length": 12,
    "guidance_dims": (8, 8),
    "hidden": 16,
    "layers": 1,
    "heads": 2,
    "window": 2,
    "appearance_dim": 8,
    "text_dim": 8,
    "pad_len": 4,
    "decoder_dims": (8, 8),
    "decoder_guidance_dims": (4, 4),
}


def tiny_config(vocab_size, **changes):
    return CATSegConfig(**{**_SIZES, "vocab_size": vocab_size, **changes})
