"""Diffusers pipeline folders: locating or downloading, checking and loading.

Folders are untrusted. Only the parts that loraseg uses are read, each with its one allowed class;
no class named by a folder is imported, and no pickle is opened.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from loraseg.backbones.pipeline_fit import check_parts_fit
from loraseg.backbones.pipeline_layout import (
    INDEX_FILE,
    MODEL_PARTS,
    PIPELINE_PARTS,
    TOKENIZER_FILES,
    TOKENIZER_PARTS,
    FileListing,
    PipelineKind,
    local_listing,
    pipeline_digest,
    read_index,
    used_files,
)
from loraseg.backbones.weights import parse_hub_spec, split_pin
from loraseg.cache_dir import cache_dir, publish_directory
from loraseg.compat import prepare_torchvision
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import local_path, open_store

__all__ = ["PipelineSource", "load_parts", "resolve_pipeline"]

# Errors that transformers and diffusers raise for malformed configs and weights.
_LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError),
    *(ArithmeticError, AttributeError, ImportError, AssertionError),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSource:
    """A local pipeline folder that passed the checks.

    Attributes:
        name: The spec without a pinned digest.
        folder: The folder.
        digest: See :func:`~loraseg.backbones.pipeline_layout.pipeline_digest`.
        kind: The kind of pipeline.
        scheduler: Class name of the scheduler.
        zero_unconditional: Whether the unconditional encoding is all zeros.
    """

    name: str
    folder: Path
    digest: str
    kind: PipelineKind
    scheduler: str
    zero_unconditional: bool


def resolve_pipeline(spec: str) -> PipelineSource:
    """Locate or download a pipeline folder and check its files.

    Args:
        spec: See :func:`~loraseg.backbones.diffusion.load_diffusion`. A folder in a store is
            copied to the cache; with a pinned digest later calls read the copy.

    Raises:
        ConfigError: The folder does not exist, or the spec is malformed.
        IntegrityError: A part is missing, a pickle or of an unexpected class, or the digest
            differs from the pinned one.
        StoreError: The store cannot be read.
    """
    name, pinned = split_pin(spec)
    source = _from_cache(name, pinned) if pinned and name.startswith("s3://") else None
    if source is None:
        source = _inspect(name, _resolve_folder(name))
    if pinned not in (None, source.digest):
        raise IntegrityError(f"{name}: sha256 is {source.digest}, pinned {pinned}")
    return source


def load_parts(source: PipelineSource, dtype: torch.dtype) -> dict[str, Any]:
    """Load the parts of a pipeline on the CPU; return them by name.

    The VAE of SDXL is loaded in float32 for every ``dtype``.

    Raises:
        IntegrityError: Weights do not fit their config, or a file cannot be read.
    """
    prepare_torchvision()
    parts: dict[str, Any] = {}
    with _without_progress_bars():
        for part in PIPELINE_PARTS[source.kind]:
            full_precision = part == "vae" and source.kind == "sdxl"
            try:
                parts[part] = _load_part(source, part, torch.float32 if full_precision else dtype)
            except _LOAD_ERRORS as error:
                raise IntegrityError(
                    f"{source.folder / part}: cannot be loaded: {error!r}"
                ) from error
    check_parts_fit(parts, str(source.folder))
    return parts


@contextlib.contextmanager
def _without_progress_bars() -> Generator[None, None, None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _load_part(source: PipelineSource, part: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    folder = str(source.folder / part)
    if part == "scheduler":
        return getattr(diffusers, source.scheduler).from_pretrained(folder, local_files_only=True)
    if part not in MODEL_PARTS:
        return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    library, classes, _ = MODEL_PARTS[part]
    module = diffusers if library == "diffusers" else transformers
    model, info = getattr(module, classes[0]).from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **{"torch_dtype" if library == "diffusers" else "dtype": dtype},
    )
    # Both libraries only warn about these keys and leave random values in the model.
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise ValueError(f"{problem} {sorted(map(str, info[problem]))[:3]}")
    return model


def _inspect(name: str, folder: Path) -> PipelineSource:
    if not folder.is_dir():
        raise ConfigError(
            f"pipeline {name!r}: folder {folder} does not exist; expected 'miniature', a "
            f"diffusers folder, file:///folder, s3://bucket/prefix or hf:org/name"
        )
    index, kind = read_index(local_listing(folder))
    return PipelineSource(
        name=name,
        folder=folder,
        digest=pipeline_digest(folder),
        kind=kind,
        scheduler=index["scheduler"][1],
        zero_unconditional=kind == "sdxl" and index.get("force_zeros_for_empty_prompt", True),
    )


def _resolve_folder(name: str) -> Path:
    if name.startswith("s3://"):
        return _download_to_cache(name)
    if name.startswith("hf:"):
        return _from_hub(name)
    if name == "miniature":
        return Path(__file__).parents[1] / "miniature" / "weights" / "generator"
    return local_path(name)


def _from_cache(name: str, digest: str) -> PipelineSource | None:
    """Return the cached folder with a digest; None if there is none or it is damaged."""
    folder = cache_dir("pipelines") / digest
    if not folder.is_dir():
        return None
    try:
        source = _inspect(name, folder)
    except IntegrityError:
        return None
    return source if source.digest == digest else None


def _download_to_cache(uri: str) -> Path:
    """Copy the used files of a pipeline in a store to a cache folder named by their digest."""
    store = open_store(uri)
    listing = FileListing(uri, frozenset(store.list()), store.get)
    cache = cache_dir("pipelines")
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        for name in used_files(listing):
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(store.get(name))
        target = cache / pipeline_digest(partial)
        if target.is_dir() and _from_cache(uri, target.name) is None:
            shutil.rmtree(target)
        if not target.is_dir():
            publish_directory(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _from_hub(spec: str) -> Path:
    hub = parse_hub_spec(spec)
    if hub is None or hub.file is not None:
        raise ConfigError(f"pipeline {spec!r}: expected hf:org/name or hf:org/name@revision")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [INDEX_FILE, "*/config.json", "scheduler/scheduler_config.json"]
    patterns += [f"{part}/{name}" for part in TOKENIZER_PARTS for name in TOKENIZER_FILES]
    for part, (_, _, stem) in MODEL_PARTS.items():
        patterns += [f"{part}/{stem}.safetensors", f"{part}/{stem}-*.safetensors"]
        patterns.append(f"{part}/{stem}.safetensors.index.json")
    try:
        path = snapshot_download(hub.repo, revision=hub.revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"pipeline {spec!r}: download from the hub failed: {error}") from error
    return Path(path)
