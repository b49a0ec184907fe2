"""Local cache folders for data that can be computed or downloaded again."""

import os
import uuid
from pathlib import Path

__all__ = ["cache_dir", "publish_directory", "publish_file"]


def cache_dir(kind: str) -> Path:
    """Return the cache folder of one kind of data; the folder may not exist yet.

    Its parent is ``$LORASEG_CACHE`` or, if that is unset, ``loraseg`` in the user's cache folder.
    """
    if root := os.environ.get("LORASEG_CACHE"):
        return Path(root) / kind
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "loraseg" / kind


def publish_directory(source: Path, target: Path) -> None:
    """Rename a complete folder; do nothing if another process has already created the target."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def publish_file(path: Path, data: bytes) -> None:
    """Write a file atomically; parent folders are created.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
