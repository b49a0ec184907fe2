"""Sources of weight files: the package, a path, a store or a hub."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from loraseg.cache_dir import cache_dir, publish_file
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import local_path, open_parent_store

__all__ = [
    "HubSpec",
    "WeightSource",
    "absolute_spec",
    "parse_hub_spec",
    "resolve_weights",
    "split_pin",
]

_HUB_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>.+))?")
_PINNED_SPEC = re.compile(r"(?P<spec>.*)#sha256=(?P<digest>[0-9a-f]{64})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A local weight file.

    Attributes:
        name: The spec without a pinned digest.
        path: The file.
        digest: Sha256 (hex) of its bytes.
    """

    name: str
    path: Path
    digest: str


def resolve_weights(spec: str, *, miniature: str = "catseg") -> WeightSource:
    """Locate or download a weight file.

    Args:
        spec: ``miniature``, a path, ``file:///path``, ``s3://bucket/key`` or
            ``hf:org/name[@revision]:file``. Only the last downloads from a hub. A suffix
            ``#sha256=<hex>`` pins the bytes; a pinned file is downloaded only once.
        miniature: Name of the package's weight file that ``miniature`` denotes.

    Raises:
        ConfigError: The file does not exist, or the spec is malformed.
        IntegrityError: The digest differs from the pinned one.
        StoreError: The store cannot be reached or lacks the object.
    """
    name, digest = split_pin(spec)
    if name.startswith("s3://"):
        source = _from_cache(name, digest) or _download(name)
    elif name.startswith("hf:"):
        source = _from_path(name, _from_hub(name))
    elif name == "miniature":
        folder = Path(__file__).parents[1] / "miniature" / "weights"
        source = _from_path(name, folder / f"{miniature}.safetensors")
    else:
        source = _from_path(name, local_path(name))
    if digest not in (None, source.digest):
        raise IntegrityError(f"{name}: sha256 is {source.digest}, pinned {digest}")
    return source


def split_pin(spec: str) -> tuple[str, str | None]:
    """Return a spec without its pinned digest, and the digest or None."""
    pinned = _PINNED_SPEC.fullmatch(spec)
    return (pinned["spec"], pinned["digest"]) if pinned else (spec, None)


def absolute_spec(spec: str) -> str:
    """Return a spec that does not depend on the working directory.

    Paths of existing files and of folders with a diffusers pipeline become absolute.
    """
    name, mark, pin = spec.partition("#")
    path = Path(name).expanduser()
    if spec == "miniature" or not (path.is_file() or (path / "model_index.json").is_file()):
        return spec
    return str(path.resolve()) + mark + pin


@dataclass(frozen=True, slots=True)
class HubSpec:
    """A repository of the Hugging Face hub, or a file in it."""

    repo: str
    revision: str | None
    file: str | None


def parse_hub_spec(spec: str) -> HubSpec | None:
    """Parse ``hf:org/name[@revision][:file]``; return None for other texts."""
    match = _HUB_SPEC.fullmatch(spec)
    return match and HubSpec(match["repo"], match["revision"], match["file"])


def _from_path(name: str, path: Path) -> WeightSource:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"weights {name!r}: cannot read {path}: {error.strerror}; expected 'miniature', a "
            f"path, file:///path, s3://bucket/key or hf:org/name:file"
        ) from error
    return WeightSource(name, path, digest)


def _from_cache(uri: str, digest: str | None) -> WeightSource | None:
    if digest is None:
        return None
    path = cache_dir("weights") / digest / uri.rpartition("/")[2]
    if not path.is_file():
        return None
    source = _from_path(uri, path)
    return source if source.digest == digest else None


def _download(uri: str) -> WeightSource:
    store, key = open_parent_store(uri)
    data = store.get(key)
    digest = hashlib.sha256(data).hexdigest()
    path = cache_dir("weights") / digest / key
    publish_file(path, data)
    return WeightSource(uri, path, digest)


def _from_hub(spec: str) -> Path:
    hub = parse_hub_spec(spec)
    if hub is None or hub.file is None:
        raise ConfigError(f"weights {spec!r}: expected hf:org/name:file")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(hub.repo, hub.file, revision=hub.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"weights {spec!r}: download from the hub failed: {error}") from error
    return Path(path)
