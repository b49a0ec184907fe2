"""A local copy of a dataset folder that lies in an object store."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from loraseg.cache_dir import cache_dir, publish_directory
from loraseg.errors import DatasetError

__all__ = ["ReadableStore", "download_to_cache"]

logger = logging.getLogger(__name__)


@runtime_checkable
class ReadableStore(Protocol):
    """The part of an object store that reading needs."""

    @property
    def uri(self) -> str:
        """Where the store is."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys below ``prefix``, sorted."""
        ...

    def get(self, key: str) -> bytes:
        """Return an object."""
        ...


def download_to_cache(store: ReadableStore, cache: Path | None = None) -> Path:
    """Copy the dataset folder at the root of ``store`` into the cache and return the copy.

    The copy is named by the keys and content of what was read and renamed into place when whole, so
    any number of processes may ask at once and a data set changed in the store gets a new copy.
    Every call reads the whole folder: an object store has no cheaper promise that nothing changed.

    Args:
        store: Rooted at the dataset folder.
        cache: Where copies are kept; by default ``$LORASEG_CACHE``, else ``loraseg`` in the
            user's cache folder.

    Raises:
        DatasetError: Nothing of a dataset folder is there, or a key is not a plain path.
        StoreError: The store cannot be read.
    """
    keys = [key for key in store.list() if _is_dataset_key(key)]
    if not keys:
        raise DatasetError(f"{store.uri}: no images/, masks/ or classes.json; not a dataset folder")
    cache = cache or cache_dir("datasets")
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        target = cache / _download(store, keys, partial)
        if not target.is_dir():
            publish_directory(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("copied %d files of %s to %s", len(keys), store.uri, target)
    return target


def _download(store: ReadableStore, keys: list[str], folder: Path) -> str:
    """Write the objects below ``folder`` and return the digest over keys and contents."""
    rows: list[tuple[str, str]] = []
    for key in keys:
        parts = PurePosixPath(key).parts
        if key.startswith("/") or "\\" in key or ".." in parts or not key.isprintable():
            raise DatasetError(f"{store.uri}: key {key!r} is not a plain path")
        data = store.get(key)
        path = folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        rows.append((key, hashlib.sha256(data).hexdigest()))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _is_dataset_key(key: str) -> bool:
    if key.endswith("/"):  # the marker that some tools leave for an empty folder
        return False
    top, _, rest = key.partition("/")
    return top in ("images", "masks") if rest else top == "classes.json" or top.endswith(".txt")
