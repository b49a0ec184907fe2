"""Diffusers pipeline folders: found or fetched, checked as if a stranger had made them, loaded.

Only the parts that loraseg uses are read, each with the one class that it may have; nothing of
what a folder names is imported, and no pickle is opened.
"""

import contextlib
import re
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
from loraseg.backbones.weights import split_pin
from loraseg.cache_dir import cache_dir, publish_directory
from loraseg.compat import prepare_torchvision
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import open_store

__all__ = ["PipelineSource", "load_parts", "resolve_pipeline"]

# What transformers and diffusers raise for the config of a stranger.
_LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError),
    *(ArithmeticError, AttributeError, ImportError, AssertionError),
)
_HUB_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSource:
    """A checked pipeline folder on this machine.

    Attributes:
        name: What the user called it, without a pinned digest.
        folder: Where it is.
        digest: See :func:`~loraseg.backbones.pipeline_layout.pipeline_digest`.
        kind: Which of the two pipelines it is.
        scheduler: Name of the scheduler's class.
        zero_unconditional: Whether the empty prompt stands for zeros.
    """

    name: str
    folder: Path
    digest: str
    kind: PipelineKind
    scheduler: str
    zero_unconditional: bool


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
    source = _from_cache(name, pinned) if pinned and name.startswith("s3://") else None
    if source is None:
        source = _inspect(name, _resolve_folder(name))
    if pinned not in (None, source.digest):
        raise IntegrityError(f"{name}: sha256 is {source.digest}, pinned {pinned}")
    return source


def load_parts(source: PipelineSource, dtype: torch.dtype) -> dict[str, Any]:
    """Load the parts of a pipeline on the CPU, by name.

    The VAE of an SDXL is loaded in float32 whatever ``dtype`` is.

    Raises:
        IntegrityError: Weights do not fit their config, or a file is not readable.
    """
    prepare_torchvision()
    parts: dict[str, Any] = {}
    with _without_progress_bars():
        for part in PIPELINE_PARTS[source.kind]:
            wide = part == "vae" and source.kind == "sdxl"
            try:
                parts[part] = _load_part(source, part, torch.float32 if wide else dtype)
            except _LOAD_ERRORS as error:
                raise IntegrityError(
                    f"{source.folder / part}: cannot be loaded: {error!r}"
                ) from error
    check_parts_fit(parts, str(source.folder))
    return parts


@contextlib.contextmanager
def _without_progress_bars() -> Generator[None, None, None]:
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
    return Path(name.removeprefix("file://")).expanduser()


def _from_cache(name: str, digest: str) -> PipelineSource | None:
    """Return what is kept under a digest, None if nothing is or it is damaged."""
    folder = cache_dir("pipelines") / digest
    if not folder.is_dir():
        return None
    try:
        source = _inspect(name, folder)
    except IntegrityError:
        return None
    return source if source.digest == digest else None


def _download_to_cache(uri: str) -> Path:
    """Copy the used files of a pipeline in a store to the cache, named by their digest."""
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
    match = _HUB_SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(f"pipeline {spec!r}: expected hf:org/name or hf:org/name@revision")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [INDEX_FILE, "*/config.json", "scheduler/scheduler_config.json"]
    wanted += [f"{part}/{name}" for part in TOKENIZER_PARTS for name in TOKENIZER_FILES]
    for part, (_, _, stem) in MODEL_PARTS.items():
        wanted += [f"{part}/{stem}.safetensors", f"{part}/{stem}-*.safetensors"]
        wanted.append(f"{part}/{stem}.safetensors.index.json")
    try:
        path = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=wanted)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"pipeline {spec!r}: the hub does not give it: {error}") from error
    return Path(path)
