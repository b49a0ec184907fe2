"""Where weights come from: a name, a path, a store or, only when named, a hub."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import open_store

__all__ = ["WeightSource", "absolute_spec", "resolve_weights", "split_pin", "weights_cache_dir"]

_HUB_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?:(?P<file>.+)")
_PINNED_SPEC = re.compile(r"(?P<spec>.*)#sha256=(?P<digest>[0-9a-f]{64})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A weight file on this machine.

    Attributes:
        name: What the user called it, without a pinned digest.
        path: The file.
        digest: sha256 of its bytes, hex.
    """

    name: str
    path: Path
    digest: str


def resolve_weights(spec: str, *, miniature: str = "catseg") -> WeightSource:
    """Find or fetch a weight file.

    Args:
        spec: ``miniature``; a path; ``file:///path``; ``s3://bucket/key``; or
            ``hf:org/name:file`` (``hf:org/name@revision:file``). Nothing else is downloaded.
            ``#sha256=<hex>`` behind it pins the bytes; a pinned file that was fetched before is
            not fetched again.
        miniature: Which of the package's weight files ``miniature`` stands for.

    Raises:
        ConfigError: There is no such file, or the spec is of no known kind.
        IntegrityError: The bytes are not the pinned ones.
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
        source = _from_path(name, Path(name.removeprefix("file://")).expanduser())
    if digest not in (None, source.digest):
        raise IntegrityError(f"{name}: sha256 is {source.digest}, pinned {digest}")
    return source


def split_pin(spec: str) -> tuple[str, str | None]:
    """Return a spec without its pinned digest, and the digest if there is one."""
    pinned = _PINNED_SPEC.fullmatch(spec)
    return (pinned["spec"], pinned["digest"]) if pinned else (spec, None)


def absolute_spec(spec: str) -> str:
    """Return a spec that means the same in any folder: a path to a file becomes absolute.

    So does one to the folder of a diffusers pipeline.
    """
    path, mark, pin = spec.partition("#")
    place = Path(path).expanduser()
    if spec == "miniature" or not (place.is_file() or (place / "model_index.json").is_file()):
        return spec
    return str(place.resolve()) + mark + pin


def weights_cache_dir() -> Path:
    """Return where fetched weights are kept: LORASEG_CACHE or ~/.cache/loraseg."""
    return Path(os.environ.get("LORASEG_CACHE") or "~/.cache/loraseg").expanduser() / "weights"


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
    path = weights_cache_dir() / digest / uri.rpartition("/")[2]
    if not path.is_file():
        return None
    found = _from_path(uri, path)
    return found if found.digest == digest else None


def _download(uri: str) -> WeightSource:
    prefix, _, key = uri.rpartition("/")
    if not key or prefix in ("s3:", "s3:/"):
        raise ConfigError(f"weights {uri!r}: expected s3://bucket/key")
    data = open_store(prefix).get(key)
    digest = hashlib.sha256(data).hexdigest()
    path = weights_cache_dir() / digest / key
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may fetch the same file: each writes its own part and renames it.
    part = path.with_name(f"{key}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)
    return WeightSource(uri, path, digest)


def _from_hub(spec: str) -> Path:
    match = _HUB_SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(f"weights {spec!r}: expected hf:org/name:file")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(match["repo"], match["file"], revision=match["revision"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"weights {spec!r}: the hub does not give them: {error}") from error
    return Path(path)
