"""Copies a dataset from an object store to the local cache."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from loraseg.cache_dir import cache_dir, publish_directory
from loraseg.errors import DatasetError

__all__ = ["ReadableStore", "download_to_cache"]

logger = logging.getLogger(__name__)


@runtime_checkable
class ReadableStore(Protocol):
    """The methods of an object store that copying needs."""

    @property
    def uri(self) -> str:
        """The URI of the root."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys below ``prefix``, sorted."""
        ...

    def get(self, key: str) -> bytes:
        """Return the bytes of an object."""
        ...


def download_to_cache(store: ReadableStore, keys: Sequence[str], cache: Path | None = None) -> Path:
    """Copy objects into a folder of the cache and return the folder.

    The folder is named by a digest of keys and contents and renamed into place when complete:
    concurrent processes share it, and a changed dataset gets a new one. Every call reads all
    objects, because an object store offers no cheaper proof that nothing has changed.

    Args:
        store: Rooted at the dataset.
        keys: The objects to copy.
        cache: Parent folder; by default "datasets" of :func:`loraseg.cache_dir.cache_dir`.

    Raises:
        DatasetError: A key is not a plain path.
        StoreError: The store cannot be read.
    """
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


def _download(store: ReadableStore, keys: Sequence[str], folder: Path) -> str:
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
