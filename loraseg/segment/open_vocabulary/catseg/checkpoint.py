"""Checkpoint files of CAT-Seg models: safetensors with the config in the header."""

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from loraseg.cache_dir import publish_file
from loraseg.config import build, to_dict
from loraseg.errors import IntegrityError
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.layout import check_keys
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.storage.safetensors_io import encode_safetensors

__all__ = ["encode_catseg", "is_catseg_file", "load_catseg", "read_metadata", "save_catseg"]

_FORMAT = "loraseg-catseg-1"


def save_catseg(
    model: CATSeg,
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model atomically, with the config as JSON in the header.

    Args:
        model: The model.
        path: The safetensors file.
        metadata: Additional strings for the header, such as "vocabulary" or "prompt".
        dtype: Stored dtype of the weights; None keeps theirs.
    """
    publish_file(Path(path), encode_catseg(model, metadata, dtype=dtype))


def encode_catseg(
    model: CATSeg, metadata: Mapping[str, str] | None = None, *, dtype: torch.dtype | None = None
) -> bytes:
    """Return the bytes of the file of :func:`save_catseg`; the arguments are the same."""
    header = {
        **(metadata or {}),
        "format": _FORMAT,
        "config": json.dumps(to_dict(model.config), sort_keys=True),
    }
    tensors = {
        key: value.detach().to(dtype or value.dtype) for key, value in model.state_dict().items()
    }
    return encode_safetensors(tensors, header)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the header strings of a safetensors file.

    Raises:
        IntegrityError: The file cannot be read as safetensors.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path}: cannot be read as safetensors: {error}") from error


def is_catseg_file(path: str | Path) -> bool:
    """Return whether a file was written by :func:`save_catseg`."""
    try:
        return read_metadata(path).get("format") == _FORMAT
    except IntegrityError:
        return False


def load_catseg(path: str | Path, **overrides: object) -> CATSeg:
    """Read a model written by :func:`save_catseg`, as float32 and in evaluation mode.

    Args:
        path: The safetensors file.
        overrides: Fields of :class:`CATSegConfig` to change, such as ``clip_attention_lora``.

    Raises:
        IntegrityError: The file is not such a checkpoint, or its tensors do not fit its config.
        ConfigError: The config in the header or an override is invalid.
    """
    metadata = read_metadata(path)
    if metadata.get("format") != _FORMAT:
        raise IntegrityError(
            f"{path}: header format is {metadata.get('format')!r}, expected {_FORMAT!r}"
        )
    try:
        values = json.loads(metadata["config"])
    except (KeyError, ValueError) as error:
        raise IntegrityError(f"{path}: the header has no readable config") from error
    config = build(CATSegConfig, {**values, **overrides}, where=str(path))
    # Copied: the rounding of products depends on the alignment of the weights.
    state = {
        key: value.to(torch.float32, copy=True)
        for key, value in safetensors.torch.load_file(path).items()
    }
    with torch.device("meta"):
        model = CATSeg(config)
    check_keys(
        {key: tuple(value.shape) for key, value in state.items()},
        {key: tuple(value.shape) for key, value in model.state_dict().items()},
        str(path),
    )
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(True).eval()
