"""Adapter files in peft's format; all files are treated as untrusted.

``adapter_config.json`` and ``adapter_model.safetensors`` with the keys
``base_model.model.<module>.lora_A.weight`` (r, d_in) and ``.lora_B.weight`` (d_out, r), as written
by ``peft.PeftModel.save_pretrained`` and published by SemLA. Pickles are never opened.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.peft_config import (
    MAX_CONFIG_BYTES,
    PeftLoraConfig,
    parse_config,
    render_config,
)
from loraseg.adapters.safetensors_check import (
    read_header,
    read_tensors,
    require_dtype,
    require_finite,
)
from loraseg.errors import AdapterMismatchError, IntegrityError
from loraseg.storage.json_io import canonical_json
from loraseg.tensor_types import Tensor

__all__ = [
    "ATTENTION_MIX_FILE",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "extract_pairs",
    "files_digest",
    "load_adapter",
    "save_adapter",
    "to_peft_files",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# The attention mix of a generator adapter, see loraseg.adapters.attention_mix.
ATTENTION_MIX_FILE = "fusion.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.((?:[A-Za-z0-9_]+\.)+)lora_(A|B)\.weight")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_adapter(
    source: str | Path | Mapping[str, bytes],
    *,
    name: str | None = None,
    base_digest: str | None = None,
) -> Adapter:
    """Read an adapter from a folder or from the bytes of its files.

    Matrices become float32 on the CPU; float64 is kept. Other files are ignored.

    Args:
        source: A folder, or file bytes by file name.
        name: Name of the adapter; by default that of the folder, or "adapter".
        base_digest: Sha256 of the expected base; None for the one in the config.

    Raises:
        IntegrityError: A file is missing, a pickle, malformed or too large, a tensor has a wrong
            name, dtype or shape or a value that is not finite, a pair is incomplete, or the
            config and ``base_digest`` name different bases.
    """
    files = source if isinstance(source, Mapping) else _read_folder(Path(source))
    adapter_name = name or ("adapter" if isinstance(source, Mapping) else Path(source).name)
    _require_files(files, adapter_name)
    try:
        config = parse_config(files[CONFIG_FILE])
        pairs = _read_pairs(files[WEIGHTS_FILE], config)
    except (IntegrityError, AdapterMismatchError) as error:
        raise IntegrityError(f"adapter {adapter_name!r}: {error}") from error
    if base_digest and config.base_digest and base_digest != config.base_digest:
        raise IntegrityError(
            f"adapter {adapter_name!r}: trained on base {config.base_digest}, expected "
            f"{base_digest}"
        )
    return Adapter(
        name=adapter_name,
        pairs=pairs,
        digest=files_digest(files),
        base_name=config.base_name,
        base_digest=base_digest or config.base_digest,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        bias=config.bias,
        modules_to_save=config.modules_to_save,
    )


def to_peft_files(
    pairs: Mapping[str, LoraPair],
    *,
    base_name: str | None = None,
    base_digest: str | None = None,
    use_rslora: bool = False,
) -> dict[str, bytes]:
    """Return the two files of an adapter by name; equal arguments give equal bytes.

    Raises:
        AdapterMismatchError: There are no pairs.
    """
    if not pairs:
        raise AdapterMismatchError("an adapter needs at least one LoRA pair, got none")
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {
        module: pair.scale * (pair.rank**0.5 if use_rslora else pair.rank)
        for module, pair in pairs.items()
    }
    tensors: dict[str, Tensor] = {}
    for module, pair in sorted(pairs.items()):
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.down.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.up.detach().cpu().contiguous()
    config = render_config(
        ranks, alphas, use_rslora=use_rslora, base_name=base_name, base_digest=base_digest
    )
    return {CONFIG_FILE: config, WEIGHTS_FILE: safetensors.torch.save(tensors, {"format": "pt"})}


def save_adapter(folder: str | Path, adapter: Adapter) -> None:
    """Write an adapter to a folder that ``peft.PeftModel.from_pretrained`` can load.

    Raises:
        AdapterMismatchError: The adapter has more than LoRA pairs (DoRA, biases, modules), which
            :class:`Adapter` does not store.
    """
    reason = adapter.unsupported_features()
    if reason is not None:
        raise AdapterMismatchError(f"adapter {adapter.name!r}: cannot be saved, it has {reason}")
    files = to_peft_files(
        adapter.pairs,
        base_name=adapter.base_name,
        base_digest=adapter.base_digest,
        use_rslora=adapter.use_rslora,
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file_name, data in files.items():
        (Path(folder) / file_name).write_bytes(data)


def extract_pairs(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraPair]:
    """Return copies of the LoRA pairs of a model wrapped by peft, by module name of the base."""
    pairs: dict[str, LoraPair] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if hasattr(module, "lora_A") and adapter_name in layer.lora_A:
            pairs[name.removeprefix(_PREFIX)] = LoraPair(
                layer.lora_A[adapter_name].weight.detach().clone(),
                layer.lora_B[adapter_name].weight.detach().clone(),
                float(layer.scaling[adapter_name]),
            )
    return pairs


def files_digest(files: Mapping[str, bytes]) -> str:
    """Return the digest of an adapter: sha256 of canonical JSON {file name: sha256 of its bytes}.

    It covers the config, the weights and, if present, the attention mix. Other files, such as a
    card or an exported form, do not change it.
    """
    names = (CONFIG_FILE, WEIGHTS_FILE, *({ATTENTION_MIX_FILE} & files.keys()))
    parts = {name: hashlib.sha256(files[name]).hexdigest() for name in names}
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def _read_folder(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise IntegrityError(f"{folder}: adapter folder does not exist")
    config = folder / CONFIG_FILE
    if config.is_file() and config.stat().st_size > MAX_CONFIG_BYTES:
        raise IntegrityError(f"{config}: larger than {MAX_CONFIG_BYTES} bytes")
    used = (CONFIG_FILE, ATTENTION_MIX_FILE, WEIGHTS_FILE)
    # Of other files only the names are needed, to report pickles.
    return {
        path.name: path.read_bytes() if path.name in used else b""
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _require_files(files: Mapping[str, bytes], adapter_name: str) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name in files:
            continue
        pickles = sorted(other for other in files if other.lower().endswith(_PICKLE_SUFFIXES))
        if name == WEIGHTS_FILE and pickles:
            raise IntegrityError(
                f"adapter {adapter_name!r}: {pickles[0]} is a pickle, which can run code when it "
                f"is read; expected {WEIGHTS_FILE}"
            )
        raise IntegrityError(
            f"adapter {adapter_name!r}: {name} is missing (files: {sorted(files)})"
        )


def _read_pairs(data: bytes, config: PeftLoraConfig) -> dict[str, LoraPair]:
    keys = _parse_keys(data, plain=_is_plain_lora(config))
    tensors = read_tensors(data, WEIGHTS_FILE)
    modules = sorted({module for module, _ in keys.values()})
    if not modules:
        raise IntegrityError(f"{WEIGHTS_FILE}: contains no LoRA pair")
    pairs: dict[str, LoraPair] = {}
    for module in modules:
        sides = [_PREFIX + f"{module}.lora_{side}.weight" for side in "AB"]
        for key in sides:
            if key not in tensors:
                raise IntegrityError(f"{WEIGHTS_FILE}: {key} is missing, but its partner exists")
        down, up = (require_finite(tensors[key], key, WEIGHTS_FILE) for key in sides)
        pairs[module] = _build_pair(module, down, up, config)
    return pairs


def _build_pair(module: str, down: Tensor, up: Tensor, config: PeftLoraConfig) -> LoraPair:
    rank = config.rank_of(module)
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise IntegrityError(
            f"{WEIGHTS_FILE}: module {module!r}: down {tuple(down.shape)}, up {tuple(up.shape)}; "
            f"expected down ({rank}, d_in) and up (d_out, {rank}) from the rank in the config"
        )
    return LoraPair(down, up, config.scale_of(module))


def _is_plain_lora(config: PeftLoraConfig) -> bool:
    return not config.use_dora and config.bias == "none" and not config.modules_to_save


def _parse_keys(data: bytes, *, plain: bool) -> dict[str, tuple[str, str]]:
    """Check the header before tensors are read; return (module, "A" | "B") by tensor name."""
    header = read_header(data, WEIGHTS_FILE)
    keys: dict[str, tuple[str, str]] = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        match = _KEY.fullmatch(key)
        if match:
            keys[key] = (match[1].removesuffix("."), match[2])
        elif plain:
            raise IntegrityError(
                f"{WEIGHTS_FILE}: unexpected tensor {key[:200]!r}, expected names like "
                f"{_PREFIX}<module>.lora_A.weight"
            )
        require_dtype(entry, key, WEIGHTS_FILE)
    return keys
