"""Layout of a diffusers pipeline folder: its index, parts and files, checked as untrusted input.

Only the parts that loraseg uses are checked, each against the classes that it may have.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from loraseg.compat import prepare_torchvision
from loraseg.errors import IntegrityError
from loraseg.storage.json_io import canonical_json, parse_json_object

__all__ = [
    "INDEX_FILE",
    "MODEL_PARTS",
    "PIPELINE_KINDS",
    "PIPELINE_PARTS",
    "TOKENIZER_FILES",
    "TOKENIZER_PARTS",
    "FileListing",
    "PipelineKind",
    "local_listing",
    "pipeline_digest",
    "read_index",
    "used_files",
]

PipelineKind = Literal["sd", "sdxl"]
PIPELINE_KINDS: Mapping[str, PipelineKind] = MappingProxyType(
    {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
)
INDEX_FILE = "model_index.json"
_MAX_JSON_BYTES = 2**24
_SHARD = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Part -> library, classes that the index may name (the first is the one used), weight file's stem.
MODEL_PARTS = {
    "unet": ("diffusers", ("UNet2DConditionModel",), "diffusion_pytorch_model"),
    "vae": ("diffusers", ("AutoencoderKL",), "diffusion_pytorch_model"),
    "text_encoder": ("transformers", ("CLIPTextModel",), "model"),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",), "model"),
}
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
TOKENIZER_PARTS = ("tokenizer", "tokenizer_2")
PIPELINE_PARTS: Mapping[PipelineKind, tuple[str, ...]] = MappingProxyType(
    {
        "sd": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
        "sdxl": (
            *("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
            *("text_encoder_2", "tokenizer_2"),
        ),
    }
)


@dataclass(frozen=True, slots=True)
class FileListing:
    """File names of a folder or store, with a function that reads one of them."""

    where: str
    names: frozenset[str]
    read: Callable[[str], bytes]


def pipeline_digest(folder: Path) -> str:
    """Return sha256 (hex) of canonical JSON {relative path: sha256} of the files that are used.

    Those are model_index.json and, of each part that loraseg loads, configs, tokenizer files and
    safetensors; other files of the folder do not change it.

    Raises:
        IntegrityError: The folder is not a pipeline that can be loaded.
    """
    digests: dict[str, str] = {}
    for name in used_files(local_listing(folder)):
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(canonical_json(digests)).hexdigest()


def local_listing(folder: Path) -> FileListing:
    """List a folder's index and the files of the parts that a pipeline may have."""
    paths = [folder / INDEX_FILE]
    for part in PIPELINE_PARTS["sdxl"]:
        paths += sorted((folder / part).iterdir()) if (folder / part).is_dir() else []
    names = frozenset(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    return FileListing(str(folder), names, lambda name: _read(folder / name))


def _read(path: Path) -> bytes:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise IntegrityError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
    return path.read_bytes()


def read_index(listing: FileListing) -> tuple[dict[str, Any], PipelineKind]:
    """Return model_index.json and the kind of pipeline that it describes.

    Raises:
        IntegrityError: The pipeline or a part is of another class than loraseg can use.
    """
    index = _read_object(listing, INDEX_FILE)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in PIPELINE_KINDS:
        raise IntegrityError(
            f"{listing.where}/{INDEX_FILE}: the pipeline is a {str(name)[:80]}, expected "
            f"{' or '.join(PIPELINE_KINDS)}"
        )
    kind = PIPELINE_KINDS[name]
    for part in PIPELINE_PARTS[kind]:
        _check_class(listing.where, part, index.get(part))
    if not isinstance(index.get("force_zeros_for_empty_prompt", True), bool):
        raise IntegrityError(
            f"{listing.where}/{INDEX_FILE}: force_zeros_for_empty_prompt is not a boolean"
        )
    return index, kind


def _check_class(where: str, part: str, entry: object) -> None:
    if part in MODEL_PARTS:
        library, allowed, _ = MODEL_PARTS[part]
    elif part == "scheduler":
        library, allowed = "diffusers", _scheduler_classes()
    else:
        library, allowed = "transformers", _TOKENIZERS
    if not any(entry == [library, name] for name in allowed):
        expected = "one of its schedulers" if part == "scheduler" else " or ".join(allowed)
        raise IntegrityError(
            f"{where}/{INDEX_FILE}: {part} is {str(entry)[:80]}, expected {expected} of {library}"
        )


def _scheduler_classes() -> tuple[str, ...]:
    prepare_torchvision()
    from diffusers import schedulers

    return tuple(name for name in dir(schedulers) if name.endswith("Scheduler"))


def used_files(listing: FileListing) -> list[str]:
    """Return the files that loading reads.

    Raises:
        IntegrityError: One is missing or a pickle.
    """
    _, kind = read_index(listing)
    files = [INDEX_FILE]
    for part in PIPELINE_PARTS[kind]:
        if f"{part}/adapter_config.json" in listing.names:
            raise IntegrityError(
                f"{listing.where}/{part}: holds adapter_config.json; expected a plain model, with "
                f"adapters merged or kept elsewhere"
            )
        files += [f"{part}/{name}" for name in _files_of_part(listing, part)]
    return files


def _files_of_part(listing: FileListing, part: str) -> list[str]:
    if part == "scheduler":
        return _require(listing, part, ["scheduler_config.json"])
    if part not in MODEL_PARTS:
        present = [name for name in TOKENIZER_FILES if f"{part}/{name}" in listing.names]
        words = ["tokenizer.json"] if "tokenizer.json" in present else ["vocab.json", "merges.txt"]
        _require(listing, part, ["tokenizer_config.json", *words])
        return present
    weights = f"{MODEL_PARTS[part][2]}.safetensors"
    if f"{part}/{weights}.index.json" not in listing.names:
        return _require(listing, part, ["config.json", weights])
    shards = _shards(listing, f"{part}/{weights}.index.json")
    return _require(listing, part, ["config.json", f"{weights}.index.json", *shards])


def _require(listing: FileListing, part: str, names: list[str]) -> list[str]:
    for name in names:
        if f"{part}/{name}" in listing.names:
            continue
        present = sorted(n.partition("/")[2] for n in listing.names if n.startswith(f"{part}/"))
        pickles = [other for other in present if other.endswith(_PICKLE_SUFFIXES)]
        if name.endswith(".safetensors") and pickles:
            raise IntegrityError(
                f"{listing.where}/{part}: {pickles[0]} is a pickle, which can run code when it is "
                f"read; expected {name}"
            )
        raise IntegrityError(f"{listing.where}/{part}: {name} is missing (files: {present[:10]})")
    return names


def _shards(listing: FileListing, name: str) -> list[str]:
    shard_of = _read_object(listing, name).get("weight_map")
    values = set(shard_of.values()) if isinstance(shard_of, dict) else set()
    if not values or not all(isinstance(v, str) and _SHARD.fullmatch(v) for v in values):
        raise IntegrityError(
            f"{listing.where}/{name}: weight_map does not name plain .safetensors files"
        )
    return sorted(values)


def _read_object(listing: FileListing, name: str) -> dict[str, Any]:
    if name not in listing.names:
        raise IntegrityError(f"{listing.where}: {name} is missing; not a diffusers pipeline")
    return parse_json_object(
        listing.read(name),
        f"{listing.where}/{name}",
        max_bytes=_MAX_JSON_BYTES,
        error=IntegrityError,
    )
