"""Local cache folders for data that can be computed or downloaded again."""

import os
from pathlib import Path

__all__ = ["cache_dir", "publish_directory"]


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
