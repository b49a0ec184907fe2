"""Adapters of a diffusion UNet in the formats of other programs.

The formats are diffusers' ``pytorch_lora_weights.safetensors`` and that of kohya's sd-scripts.
Files are written so that readers which ignore metadata and alphas get the right scale: it is
folded into B, alpha equals the rank, and all layers are padded with zeros to one rank.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.peft_config import PeftLoraConfig, parse_config
from loraseg.adapters.safetensors_check import (
    MAX_HEADER_BYTES,
    read_header,
    read_tensors,
    require_dtype,
    require_finite,
)
from loraseg.errors import AdapterMismatchError, IntegrityError
from loraseg.storage.json_io import parse_json_object
from loraseg.storage.safetensors_io import encode_safetensors
from loraseg.tensor_types import Tensor

__all__ = [
    "DIFFUSERS_FILE",
    "KOHYA_FILE",
    "read_diffusers",
    "read_kohya",
    "to_diffusers_files",
    "to_kohya_file",
]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
_METADATA_KEY = "lora_adapter_metadata"
_UNET_PREFIX = "unet."
_DIFFUSERS_KEY = re.compile(r"unet\.((?:[A-Za-z0-9_]+\.)+)lora_([AB])\.weight")
_KOHYA_KEY = re.compile(r"lora_unet_([A-Za-z0-9_]+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_UNET_TOP_LEVEL = (
    *("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out"),
    *("time_embedding", "add_embedding", "class_embedding"),
)
# kohya replaces every "." by "_", so the names that contain a "_" must be listed.
_KOHYA_NAME_PART = re.compile(
    r"(?:down_blocks|up_blocks|mid_block|transformer_blocks|time_emb_proj|time_embedding"
    r"|add_embedding|class_embedding|conv_shortcut|conv_in|conv_out|proj_in|proj_out|linear_\d"
    r"|to_(?:q|k|v|out)|[A-Za-z0-9]+)(?:_|$)"
)


def to_diffusers_files(pairs: Mapping[str, LoraPair]) -> dict[str, bytes]:
    """Return the file for diffusers' ``load_lora_weights``, by name; equal pairs give equal bytes.

    Args:
        pairs: LoRA pairs by module name of the UNet; scales and ranks may differ.

    Raises:
        AdapterMismatchError: There are no pairs.
    """
    rank, padded = _pad_to_max_rank(pairs)
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in padded.items():
        tensors[f"{_UNET_PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{_UNET_PREFIX}{module}.lora_B.weight"] = up
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(pairs),
    }
    metadata = json.dumps(
        {_UNET_PREFIX + key: value for key, value in settings.items()}, sort_keys=True
    )
    return {DIFFUSERS_FILE: encode_safetensors(tensors, {"format": "pt", _METADATA_KEY: metadata})}


def to_kohya_file(pairs: Mapping[str, LoraPair]) -> bytes:
    """Return a file in kohya's format, for ComfyUI and others; equal pairs give equal bytes.

    Args:
        pairs: LoRA pairs by module name of the UNet; scales and ranks may differ.

    Raises:
        AdapterMismatchError: There are no pairs, or a module name cannot be recovered from its
            kohya form.
    """
    rank, padded = _pad_to_max_rank(pairs)
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in padded.items():
        name = module.replace(".", "_")
        if _module_from_kohya(name) != module:
            raise AdapterMismatchError(
                f"module {module!r} has no kohya form; expected one of a diffusers UNet"
            )
        tensors[f"lora_unet_{name}.lora_down.weight"] = down
        tensors[f"lora_unet_{name}.lora_up.weight"] = up
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(float(rank))
    return encode_safetensors(tensors, {"format": "pt"})


def read_diffusers(data: bytes) -> dict[str, LoraPair]:
    """Read a file in diffusers' format; return LoRA pairs by module name of the UNet.

    Without metadata the scale is 1, as in diffusers.

    Raises:
        IntegrityError: The file is malformed or contains anything but LoRA pairs of a UNet's
            linear layers, a pair is incomplete, a value is not finite, or the metadata do not
            match the tensors.
    """
    header = read_header(data, DIFFUSERS_FILE)
    sides: dict[str, tuple[str, str]] = {}
    for key, entry in _tensor_entries(header):
        match = _DIFFUSERS_KEY.fullmatch(key)
        if match is None:
            raise IntegrityError(
                f"{DIFFUSERS_FILE}: unexpected tensor {key[:200]!r}, expected names like "
                f"unet.<module>.lora_A.weight"
            )
        require_dtype(entry, key, DIFFUSERS_FILE)
        sides[key] = (match[1].removesuffix("."), "down" if match[2] == "A" else "up")
    config = _config_from_metadata(header)
    return _collect_pairs(
        _LoraFile(DIFFUSERS_FILE, read_tensors(data, DIFFUSERS_FILE), sides),
        lambda module, rank, _: 1.0 if config is None else _scale_from_config(config, module, rank),
    )


def read_kohya(data: bytes) -> dict[str, LoraPair]:
    """Read a file in kohya's format with diffusers' block names; return pairs by module name.

    The scale is alpha / rank, or 1 without an alpha.

    Raises:
        IntegrityError: The file is malformed or contains anything but LoRA pairs of a UNet's
            linear layers, a pair is incomplete, or a value is not finite.
    """
    header = read_header(data, KOHYA_FILE)
    sides: dict[str, tuple[str, str]] = {}
    for key, entry in _tensor_entries(header):
        match = _KOHYA_KEY.fullmatch(key)
        module = _module_from_kohya(match[1]) if match else None
        if match is None or module is None:
            raise IntegrityError(
                f"{KOHYA_FILE}: unexpected tensor {key[:200]!r}, expected names like "
                f"lora_unet_<module>.lora_down.weight with the blocks of a diffusers UNet"
            )
        require_dtype(entry, key, KOHYA_FILE)
        sides[key] = (module, match[2].removeprefix("lora_").partition(".")[0])
    return _collect_pairs(
        _LoraFile(KOHYA_FILE, read_tensors(data, KOHYA_FILE), sides),
        lambda _, rank, alpha: 1.0 if alpha is None else alpha / rank,
    )


@dataclass(frozen=True, slots=True)
class _LoraFile:
    """The tensors of a file, with (module, "down" | "up" | "alpha") by tensor name."""

    where: str
    tensors: Mapping[str, Tensor]
    sides: Mapping[str, tuple[str, str]]


def _collect_pairs(
    lora_file: _LoraFile, scale_of: Callable[[str, int, float | None], float]
) -> dict[str, LoraPair]:
    by_module: dict[str, dict[str, Tensor]] = {}
    for key, (module, side) in lora_file.sides.items():
        by_module.setdefault(module, {})[side] = require_finite(
            lora_file.tensors[key], key, lora_file.where
        )
    if not by_module:
        raise IntegrityError(f"{lora_file.where}: contains no LoRA pair")
    pairs: dict[str, LoraPair] = {}
    for module, sides in sorted(by_module.items()):
        missing = {"down", "up"} - set(sides)
        if missing:
            raise IntegrityError(
                f"{lora_file.where}: module {module!r} has no {missing.pop()} matrix, but its "
                f"partner exists"
            )
        alpha = _alpha_value(sides.get("alpha"), module, lora_file.where)
        try:
            scale = scale_of(module, sides["down"].shape[0] if sides["down"].ndim else 0, alpha)
            pairs[module] = LoraPair(sides["down"], sides["up"], scale)
        except (AdapterMismatchError, ZeroDivisionError) as error:
            raise IntegrityError(f"{lora_file.where}: module {module!r}: {error}") from error
    return pairs


def _alpha_value(alpha: Tensor | None, module: str, where: str) -> float | None:
    if alpha is not None and alpha.numel() != 1:
        raise IntegrityError(
            f"{where}: module {module!r}: alpha of shape {tuple(alpha.shape)}, expected one number"
        )
    return None if alpha is None else float(alpha)


def _tensor_entries(header: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, entry) for key, entry in header.items() if key != "__metadata__"]


def _config_from_metadata(header: Mapping[str, Any]) -> PeftLoraConfig | None:
    """Return the UNet's peft config that diffusers stores in the header; None without one."""
    metadata = header.get("__metadata__")
    text = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    if text is None:
        return None
    where = f"{DIFFUSERS_FILE}: {_METADATA_KEY}"
    if not isinstance(text, str):
        raise IntegrityError(f"{where}: got {type(text).__name__}, expected text")
    values = parse_json_object(
        text.encode(), where, max_bytes=MAX_HEADER_BYTES, error=IntegrityError
    )
    unet_values = {
        key.removeprefix(_UNET_PREFIX): value
        for key, value in values.items()
        if key.startswith(_UNET_PREFIX)
    }
    try:
        config = parse_config(json.dumps({**unet_values, "peft_type": "LORA"}).encode())
    except IntegrityError as error:
        raise IntegrityError(f"{where}, read as {error}") from error
    if config.use_dora or config.bias != "none" or config.modules_to_save:
        raise IntegrityError(
            f"{DIFFUSERS_FILE}: the adapter has more than LoRA pairs (DoRA, biases or modules)"
        )
    return config


def _scale_from_config(config: PeftLoraConfig, module: str, rank: int) -> float:
    if config.rank_of(module) != rank:
        raise AdapterMismatchError(
            f"down has rank {rank}, expected {config.rank_of(module)} from the metadata"
        )
    return config.scale_of(module)


def _pad_to_max_rank(pairs: Mapping[str, LoraPair]) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    """Return the largest rank r, and float32 (A (r, d_in), scale * B (d_out, r)) by module."""
    if not pairs:
        raise AdapterMismatchError("an adapter needs at least one LoRA pair, got none")
    rank = max(pair.rank for pair in pairs.values())
    padded: dict[str, tuple[Tensor, Tensor]] = {}
    for module, pair in sorted(pairs.items()):
        down, up = pair.down.detach().cpu(), pair.up.detach().cpu()
        padded_down = torch.zeros(rank, down.shape[1])
        padded_up = torch.zeros(up.shape[0], rank)
        padded_down[: pair.rank] = down
        padded_up[:, : pair.rank] = pair.scale * up.double()
        padded[module] = (padded_down, padded_up)
    return rank, padded


def _module_from_kohya(name: str) -> str | None:
    """Return the module name of a kohya name; None if it is not one of a UNet."""
    words: list[str] = []
    start = 0
    if name.endswith("_"):
        return None
    while start < len(name):
        match = _KOHYA_NAME_PART.match(name, start)
        if match is None:
            return None
        words.append(match[0].removesuffix("_"))
        start = match.end()
    return ".".join(words) if words[0] in _UNET_TOP_LEVEL else None
