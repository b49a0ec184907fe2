"""Where things are kept that can be made or fetched again."""

import os
from pathlib import Path

__all__ = ["cache_dir", "publish_directory"]


def cache_dir(kind: str) -> Path:
    """Return the folder for one kind of thing; it need not exist.

    It lies in ``$LORASEG_CACHE``, else in ``loraseg`` of the user's cache folder.
    """
    if named := os.environ.get("LORASEG_CACHE"):
        return Path(named) / kind
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "loraseg" / kind


def publish_directory(source: Path, target: Path) -> None:
    """Give a finished folder its name, unless another process was first with the same content."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
