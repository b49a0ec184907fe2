"""Load official CAT-Seg checkpoints of any size."""

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from loraseg.config import build
from loraseg.errors import ConfigError, IntegrityError
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.layout import (
    check_keys,
    from_official,
    official_state_dict,
)
from loraseg.segment.open_vocabulary.catseg.model import CATSeg

__all__ = ["infer_config", "load_official_checkpoint"]

_PREDICTOR = "sem_seg_head.predictor."
_CLIP = f"{_PREDICTOR}clip_model."
_AGGREGATOR = f"{_PREDICTOR}transformer."
_HEAD_WIDTH = 64


def load_official_checkpoint(source: str | Path | Mapping[str, Any], **overrides: Any) -> CATSeg:
    """Build a CAT-Seg with the sizes and weights of an official checkpoint.

    Attention masks are only used to infer window and grid; they are recomputed. The aliases
    ``attn.{q,k,v}_proj.weight`` of SemLA's fork are ignored. Tensors are not copied, so a state
    dict on the meta device gives a model on the meta device.

    Args:
        source: A ``.pth`` or ``.safetensors`` file, or a state dict, bare or under "model".
        overrides: Fields of :class:`CATSegConfig` that the tensors do not determine:
            ``vision_heads`` and ``text_heads`` (by default heads of width 64), ``heads``,
            ``guidance_blocks``, ``pad_len``, ``pooling``, ``clip_attention_lora``, and
            ``image_size`` if one window covers the grid and the grid is not that of the positions.

    Returns:
        The model in evaluation mode.

    Raises:
        IntegrityError: The file is unreadable, or keys are missing, unknown or mis-shaped.
        ConfigError: The sizes or overrides are not valid for CAT-Seg.
    """
    where = "state dict" if isinstance(source, Mapping) else str(source)
    raw = source if isinstance(source, Mapping) else _read(Path(source))
    state = _clean(raw, where)
    config = infer_config(state, where, **overrides)
    with torch.device("meta"):
        model = CATSeg(config)
    expected = {key: tuple(value.shape) for key, value in official_state_dict(model).items()}
    got = {key: tuple(value.shape) for key, value in state.items()}
    for key in [key for key in expected if key.endswith("attn_mask") and key not in got]:
        del expected[key]
    check_keys(got, expected, where)
    model.load_state_dict(from_official(state), strict=True, assign=True)
    return model.requires_grad_(True).eval()


def infer_config(state: Mapping[str, Tensor], where: str, **overrides: Any) -> CATSegConfig:
    """Infer the config from the shapes of an official state dict without aliases and prefixes.

    Args:
        state: Tensors by key, in official shapes such as (hidden, prompts, 7, 7) of ``conv1``.
        where: Name of the checkpoint in error messages.
        overrides: See :func:`load_official_checkpoint`.

    Raises:
        IntegrityError: A tensor is missing or has another number of axes.
        ConfigError: As in :func:`load_official_checkpoint`.
    """
    shapes = _Shapes(state, where)
    patch, vision_width = shapes.read(f"{_CLIP}visual.conv1.weight", 4, 3, 0)
    (position_rows,) = shapes.read(f"{_CLIP}visual.positional_embedding", 2, 0)
    text_width, embed_dim = shapes.read(f"{_CLIP}text_projection", 2, 0, 1)
    hidden, prompts = shapes.read(f"{_AGGREGATOR}conv1.weight", 4, 0, 1)
    window, grid = shapes.window_and_grid(math.isqrt(max(position_rows - 1, 0)))
    image_size = overrides.get("image_size", grid * patch)
    sizes: dict[str, Any] = {
        "image_size": image_size,
        "patch": patch,
        "position_grid": math.isqrt(max(position_rows - 1, 0)),
        "vision_width": vision_width,
        "vision_layers": shapes.count(f"{_CLIP}visual.transformer.resblocks."),
        "embed_dim": embed_dim,
        "text_width": text_width,
        "text_layers": shapes.count(f"{_CLIP}transformer.resblocks."),
        "context_length": shapes.read(f"{_CLIP}positional_embedding", 2, 0)[0],
        "vocab_size": shapes.read(f"{_CLIP}token_embedding.weight", 2, 0)[0],
        "guidance_dims": shapes.pair("upsample1.weight", "upsample2.weight", axis=1),
        "prompts": prompts,
        "hidden": hidden,
        "layers": shapes.count(f"{_AGGREGATOR}layers."),
        "window": window or max(1, image_size // patch),
        **shapes.aggregator(),
        **overrides,
    }
    for name in ("vision", "text"):
        if f"{name}_heads" not in sizes:
            sizes[f"{name}_heads"] = _heads(name, sizes[f"{name}_width"], where)
    return build(CATSegConfig, sizes, where=where)


class _Shapes:
    """Reads sizes from the tensors of an official state dict."""

    def __init__(self, state: Mapping[str, Tensor], where: str) -> None:
        self._state = state
        self._where = where

    def read(self, key: str, dims: int, *axes: int) -> tuple[int, ...]:
        if key not in self._state:
            raise IntegrityError(f"{self._where}: not an official CAT-Seg: 1 missing: {key}")
        shape = tuple(self._state[key].shape)
        if len(shape) != dims:
            raise IntegrityError(
                f"{self._where}: mis-shaped: {key} got {shape}, expected {dims} axes"
            )
        return tuple(shape[axis] for axis in axes)

    def pair(self, first: str, second: str, *, axis: int) -> tuple[int, int]:
        return self.read(first, 4, axis)[0], self.read(second, 4, axis)[0]

    def count(self, prefix: str) -> int:
        """Return the number of consecutive indices, from 0, that follow the prefix."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        indices = {int(match[1]) for key in self._state if (match := pattern.match(key))}
        if not indices:
            raise IntegrityError(f"{self._where}: not an official CAT-Seg: 1 missing: {prefix}0")
        if max(indices) + 1 != len(indices):
            raise IntegrityError(
                f"{self._where}: {prefix} has {len(indices)} different indices up to "
                f"{max(indices)}; expected all from 0"
            )
        return len(indices)

    def window_and_grid(self, position_grid: int) -> tuple[int | None, int]:
        """Return (window, grid) from the mask of the shifted blocks: m windows of window**2 tokens.

        Without a mask one window covers the grid: (None, grid of the positions).
        """
        keys = [key for key in self._state if key.endswith(".attn_mask")]
        if not keys:
            return None, position_grid
        count, tokens = self.read(keys[0], 3, 0, 1)
        window = math.isqrt(tokens)
        return window, math.isqrt(count) * window

    def aggregator(self) -> dict[str, Any]:
        guidance = (f"{_AGGREGATOR}decoder_guidance_projection.{i}.0.weight" for i in (0, 1))
        decoder = (f"{_AGGREGATOR}decoder{i}.conv.double_conv.0.weight" for i in (1, 2))
        return {
            "appearance_dim": self.read(f"{_AGGREGATOR}guidance_projection.0.weight", 4, 0)[0],
            "text_dim": self.read(f"{_AGGREGATOR}text_guidance_projection.0.weight", 2, 0)[0],
            "decoder_dims": self.pair(*decoder, axis=0),
            "decoder_guidance_dims": self.pair(*guidance, axis=0),
        }


def _heads(name: str, width: int, where: str) -> int:
    if width % _HEAD_WIDTH:
        raise ConfigError(
            f"{where}: {name} width {width} is not a multiple of {_HEAD_WIDTH}; set {name}_heads"
        )
    return width // _HEAD_WIDTH


def _clean(raw: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Unwrap "model", strip "module." and drop the aliases of SemLA's fork."""
    inner = raw.get("model", raw)
    if not isinstance(inner, Mapping) or not inner:
        raise IntegrityError(f"{where}: expected a state dict, got {type(inner).__name__}")
    state: dict[str, Tensor] = {}
    for key, value in inner.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise IntegrityError(
                f"{where}: {key!r} is a {type(value).__name__}; expected tensors by name"
            )
        state[key.removeprefix("module.")] = value
    return {key: value for key, value in state.items() if not _is_alias(key, state)}


def _is_alias(key: str, state: Mapping[str, Tensor]) -> bool:
    stem, dot, last = key.rpartition("_proj.")
    return bool(dot) and last == "weight" and f"{stem}_proj_weight" in state


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            # Copied: the rounding of products depends on the alignment of the weights.
            return {key: value.clone() for key, value in safetensors.torch.load_file(path).items()}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise IntegrityError(f"{path}: cannot be read as a checkpoint: {error}") from error
    if not isinstance(loaded, Mapping):
        raise IntegrityError(f"{path}: expected a state dict, got {type(loaded).__name__}")
    return loaded
