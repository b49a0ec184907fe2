"""Consistency checks between the parts of a diffusers pipeline."""

import math
from collections.abc import Mapping
from typing import Any

from loraseg.errors import IntegrityError

__all__ = ["check_parts_fit"]

# Start, one word and end.
_MIN_TOKENS = 3


def check_parts_fit(parts: Mapping[str, Any], where: str) -> None:
    """Check for mismatches that would otherwise only fail, or give noise, during sampling.

    Args:
        parts: The parts by name, see :func:`~loraseg.backbones.pipeline_source.load_parts`.
        where: The folder, for error messages.

    Raises:
        IntegrityError: A tokenizer gives more tokens than its text encoder has positions, the
            UNet expects text of another width, or the scale of the latents is not positive.
    """
    width = 0
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if encoder not in parts:
            continue
        config = parts[encoder].config
        tokens, positions = parts[tokenizer].model_max_length, config.max_position_embeddings
        if type(tokens) is not int or not _MIN_TOKENS <= tokens <= positions:
            raise IntegrityError(
                f"{where}/{tokenizer}: model_max_length {str(tokens)[:20]}, expected "
                f"{_MIN_TOKENS} to {positions}, the positions of {encoder}"
            )
        width += config.hidden_size
    unet_width = parts["unet"].config.cross_attention_dim
    if {width} != set(unet_width if isinstance(unet_width, list | tuple) else [unet_width]):
        raise IntegrityError(
            f"{where}/unet: cross_attention_dim {str(unet_width)[:80]}, expected {width}, the "
            "width of the encoded text"
        )
    scale = parts["vae"].config.scaling_factor
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise IntegrityError(
            f"{where}/vae: scaling_factor {str(scale)[:20]!r}, expected a finite number above 0"
        )
