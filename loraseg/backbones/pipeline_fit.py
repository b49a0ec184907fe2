"""Whether the parts of a diffusers pipeline fit each other."""

import math
from collections.abc import Mapping
from typing import Any

from loraseg.errors import IntegrityError

__all__ = ["check_parts_fit"]

# A begin, a word and an end.
_MIN_TOKENS = 3


def check_parts_fit(parts: Mapping[str, Any], where: str) -> None:
    """Check what would show as a strange error, or as noise, only when images are made.

    Args:
        parts: As :func:`~loraseg.backbones.pipeline_source.load_parts` returns them.
        where: The folder, for messages.

    Raises:
        IntegrityError: A tokenizer gives more tokens than its text encoder reads, the UNet reads
            text of another width, or the scale of the latents is no positive number.
    """
    width = 0
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if encoder not in parts:
            continue
        config = parts[encoder].config
        tokens, most = parts[tokenizer].model_max_length, config.max_position_embeddings
        if type(tokens) is not int or not _MIN_TOKENS <= tokens <= most:
            raise IntegrityError(
                f"{where}/{tokenizer}: model_max_length {str(tokens)[:20]}, expected "
                f"{_MIN_TOKENS} to {most}, the positions of {encoder}"
            )
        width += config.hidden_size
    wanted = parts["unet"].config.cross_attention_dim
    if {width} != set(wanted if isinstance(wanted, list | tuple) else [wanted]):
        raise IntegrityError(
            f"{where}/unet: cross_attention_dim {str(wanted)[:80]}, expected {width}, the width of "
            "the encoded text"
        )
    scale = parts["vae"].config.scaling_factor
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise IntegrityError(
            f"{where}/vae: scaling_factor {str(scale)[:20]!r}, expected a finite number above 0"
        )
