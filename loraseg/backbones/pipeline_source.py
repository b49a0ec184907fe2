# pyright: basic
"""Diffusers pipeline folders: found or fetched, checked as if a stranger had made them, loaded.

Only the parts that loraseg uses are read, each with the one class that it may have; nothing of
what a folder names is imported, and no pickle is opened.
"""

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError

import loraseg
from loraseg.backbones.source import split_pin
from loraseg.cache_folder import cache_folder
from loraseg.compat import prepare_torchvision
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import open_store

__all__ = [
    "PIPELINE_KINDS",
    "Kind",
    "PipelineSource",
    "load_parts",
    "pipeline_digest",
    "resolve_pipeline",
]

Kind = Literal["sd", "sdxl"]
PIPELINE_KINDS: Mapping[str, Kind] = MappingProxyType(
    {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl"}
)
_INDEX = "model_index.json"
_MAX_JSON_BYTES = 2**24
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
_SHARD = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Part -> library, classes that the index may name (the first is the one used), weight file's stem.
_MODELS = {
    "unet": ("diffusers", ("UNet2DConditionModel",), "diffusion_pytorch_model"),
    "vae": ("diffusers", ("AutoencoderKL",), "diffusion_pytorch_model"),
    "text_encoder": ("transformers", ("CLIPTextModel",), "model"),
    "text_encoder_2": ("transformers", ("CLIPTextModelWithProjection",), "model"),
}
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_TOKENIZER_PARTS = ("tokenizer", "tokenizer_2")
_PARTS: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        "sd": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
        "sdxl": (
            *("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
            *("text_encoder_2", "tokenizer_2"),
        ),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSource:
    """A checked pipeline folder on this machine.

    Attributes:
        name: What the user called it, without a pinned digest.
        folder: Where it is.
        digest: See :func:`pipeline_digest`.
        kind: Which of the two pipelines it is.
        scheduler: Name of the scheduler's class.
        zero_unconditional: Whether the empty prompt stands for zeros.
    """

    name: str
    folder: Path
    digest: str
    kind: Kind
    scheduler: str
    zero_unconditional: bool


@dataclass(frozen=True, slots=True)
class _Listing:
    """The files that a folder or a store offers, and how to read one of them."""

    where: str
    names: frozenset[str]
    read: Callable[[str], bytes]


def resolve_pipeline(spec: str) -> PipelineSource:
    """Find or fetch a pipeline folder and check what it holds.

    Args:
        spec: See :func:`~loraseg.backbones.diffusion.load_diffusion`. A folder in a store is
            copied to the cache; with a pinned digest it is read from there the next time.

    Raises:
        ConfigError: There is no such folder, or the spec is of no known kind.
        IntegrityError: A part is missing, a pickle or of another class than expected, or the
            digest is not the pinned one.
        StoreError: The store cannot be read.
    """
    name, pinned = split_pin(spec)
    if name.startswith("s3://"):
        folder = _cached(pinned) or _mirror(name)
    elif name.startswith("hf:"):
        folder = _from_hub(name)
    elif name == "miniature":
        folder = Path(loraseg.__file__).parent / "miniature" / "weights" / "generator"
    else:
        folder = Path(name.removeprefix("file://")).expanduser()
    source = _inspect(name, folder)
    if pinned not in (None, source.digest):
        raise IntegrityError(f"{name}: sha256 is {source.digest}, pinned {pinned}")
    return source


def pipeline_digest(folder: Path) -> str:
    """Return sha256 (hex) of canonical JSON {relative path: sha256} of the files that are used.

    Those are model_index.json and, of each part that loraseg loads, configs, tokenizer files and
    safetensors; what else lies in the folder does not change it.

    Raises:
        IntegrityError: The folder is no pipeline that can be loaded.
    """
    digests: dict[str, str] = {}
    for name in _used_files(_local(folder)):
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    text = json.dumps(digests, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def load_parts(source: PipelineSource, dtype: torch.dtype) -> dict[str, Any]:
    """Load the parts of a pipeline on the CPU, by name.

    The VAE of an SDXL is loaded in float32 whatever ``dtype`` is.

    Raises:
        IntegrityError: Weights do not fit their config, or a file is not readable.
    """
    prepare_torchvision()
    parts: dict[str, Any] = {}
    with _without_progress_bars():
        for part in _PARTS[source.kind]:
            wide = part == "vae" and source.kind == "sdxl"
            try:
                parts[part] = _load_part(source, part, torch.float32 if wide else dtype)
            except _LOAD_ERRORS as error:
                raise IntegrityError(
                    f"{source.folder / part}: cannot be loaded: {error}"
                ) from error
    return parts


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_part(source: PipelineSource, part: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    folder = str(source.folder / part)
    if part == "scheduler":
        return getattr(diffusers, source.scheduler).from_pretrained(folder, local_files_only=True)
    if part not in _MODELS:
        return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    library, classes, _ = _MODELS[part]
    module = diffusers if library == "diffusers" else transformers
    model, info = getattr(module, classes[0]).from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **{"torch_dtype" if library == "diffusers" else "dtype": dtype},
    )
    # Both libraries only warn about these, and leave random values in the model.
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise ValueError(f"{problem} {sorted(map(str, info[problem]))[:3]}")
    return model


def _inspect(name: str, folder: Path) -> PipelineSource:
    if not folder.is_dir():
        raise ConfigError(
            f"pipeline {name!r}: no folder {folder}; expected 'miniature', a diffusers folder, "
            f"file:///folder, s3://bucket/prefix or hf:org/name"
        )
    index, kind = _read_index(_local(folder))
    return PipelineSource(
        name=name,
        folder=folder,
        digest=pipeline_digest(folder),
        kind=kind,
        scheduler=index["scheduler"][1],
        zero_unconditional=kind == "sdxl" and index.get("force_zeros_for_empty_prompt", True),
    )


def _local(folder: Path) -> _Listing:
    paths = [folder / _INDEX]
    for part in _PARTS["sdxl"]:
        paths += sorted((folder / part).iterdir()) if (folder / part).is_dir() else []
    names = frozenset(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    return _Listing(str(folder), names, lambda name: _read(folder / name))


def _read(path: Path) -> bytes:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise IntegrityError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
    return path.read_bytes()


def _read_index(listing: _Listing) -> tuple[dict[str, Any], Kind]:
    """Return model_index.json after checking the class of the pipeline and of every part."""
    index = _read_object(listing, _INDEX)
    found = index.get("_class_name")
    if not isinstance(found, str) or found not in PIPELINE_KINDS:
        raise IntegrityError(
            f"{listing.where}/{_INDEX}: the pipeline is a {str(found)[:80]}, expected "
            f"{' or '.join(PIPELINE_KINDS)}"
        )
    kind = PIPELINE_KINDS[found]
    for part in _PARTS[kind]:
        _check_class(listing.where, part, index.get(part))
    if not isinstance(index.get("force_zeros_for_empty_prompt", True), bool):
        raise IntegrityError(
            f"{listing.where}/{_INDEX}: force_zeros_for_empty_prompt is no true or false"
        )
    return index, kind


def _check_class(where: str, part: str, entry: object) -> None:
    if part in _MODELS:
        library, allowed, _ = _MODELS[part]
    elif part == "scheduler":
        library, allowed = "diffusers", _scheduler_classes()
    else:
        library, allowed = "transformers", _TOKENIZERS
    if not any(entry == [library, name] for name in allowed):
        expected = "one of its schedulers" if part == "scheduler" else " or ".join(allowed)
        raise IntegrityError(
            f"{where}/{_INDEX}: {part} is {str(entry)[:80]}, expected {expected} of {library}"
        )


def _scheduler_classes() -> tuple[str, ...]:
    prepare_torchvision()
    from diffusers import schedulers

    return tuple(name for name in dir(schedulers) if name.endswith("Scheduler"))


def _used_files(listing: _Listing) -> list[str]:
    """Return the files that loading reads.

    Raises:
        IntegrityError: One is missing or a pickle.
    """
    _, kind = _read_index(listing)
    files = [_INDEX]
    for part in _PARTS[kind]:
        if f"{part}/adapter_config.json" in listing.names:
            raise IntegrityError(
                f"{listing.where}/{part}: holds adapter_config.json; expected a plain model, with "
                f"adapters merged or kept elsewhere"
            )
        files += [f"{part}/{name}" for name in _files_of_part(listing, part)]
    return files


def _files_of_part(listing: _Listing, part: str) -> list[str]:
    if part == "scheduler":
        return _require(listing, part, ["scheduler_config.json"])
    if part not in _MODELS:
        there = [name for name in _TOKENIZER_FILES if f"{part}/{name}" in listing.names]
        words = ["tokenizer.json"] if "tokenizer.json" in there else ["vocab.json", "merges.txt"]
        _require(listing, part, ["tokenizer_config.json", *words])
        return there
    weights = f"{_MODELS[part][2]}.safetensors"
    if f"{part}/{weights}.index.json" not in listing.names:
        return _require(listing, part, ["config.json", weights])
    shards = _shards(listing, f"{part}/{weights}.index.json")
    return _require(listing, part, ["config.json", f"{weights}.index.json", *shards])


def _require(listing: _Listing, part: str, names: list[str]) -> list[str]:
    for name in names:
        if f"{part}/{name}" in listing.names:
            continue
        there = sorted(n.partition("/")[2] for n in listing.names if n.startswith(f"{part}/"))
        pickles = [other for other in there if other.endswith(_PICKLES)]
        if name.endswith(".safetensors") and pickles:
            raise IntegrityError(
                f"{listing.where}/{part}: {pickles[0]} is a pickle, which can run code when it is "
                f"read; expected {name}"
            )
        raise IntegrityError(f"{listing.where}/{part}: {name} is missing (files: {there[:10]})")
    return names


def _shards(listing: _Listing, name: str) -> list[str]:
    places = _read_object(listing, name).get("weight_map")
    values = set(places.values()) if isinstance(places, dict) else set()
    if not values or not all(isinstance(v, str) and _SHARD.fullmatch(v) for v in values):
        raise IntegrityError(
            f"{listing.where}/{name}: weight_map does not name plain .safetensors files"
        )
    return sorted(values)


def _read_object(listing: _Listing, name: str) -> dict[str, Any]:
    if name not in listing.names:
        raise IntegrityError(f"{listing.where}: {name} is missing; not a diffusers pipeline")
    try:
        values = json.loads(listing.read(name))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{listing.where}/{name}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise IntegrityError(f"{listing.where}/{name}: expected a JSON object")
    return values


def _cached(digest: str | None) -> Path | None:
    folder = cache_folder("pipelines") / (digest or "")
    # Looked at again rather than trusted: a cache can be damaged like any folder.
    if digest is None or not folder.is_dir() or pipeline_digest(folder) != digest:
        return None
    return folder


def _mirror(uri: str) -> Path:
    """Copy the used files of a pipeline in a store to the cache, named by their digest."""
    store = open_store(uri)
    listing = _Listing(uri, frozenset(store.list()), store.get)
    cache = cache_folder("pipelines")
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        for name in _used_files(listing):
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(store.get(name))
        target = cache / pipeline_digest(partial)
        if target.is_dir() and _cached(target.name) is None:
            shutil.rmtree(target)
        if not target.is_dir():
            _rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _rename(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first with the same content
            raise


def _from_hub(spec: str) -> Path:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise ConfigError(f"pipeline {spec!r}: expected hf:org/name or hf:org/name@revision")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [_INDEX, "*/config.json", "scheduler/scheduler_config.json"]
    wanted += [f"{part}/{name}" for part in _TOKENIZER_PARTS for name in _TOKENIZER_FILES]
    for part, (_, _, stem) in _MODELS.items():
        wanted += [f"{part}/{stem}.safetensors", f"{part}/{stem}-*.safetensors"]
        wanted.append(f"{part}/{stem}.safetensors.index.json")
    try:
        path = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=wanted)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"pipeline {spec!r}: the hub does not give it: {error}") from error
    return Path(path)
