"""A digest of the content of some objects of a store."""

import hashlib
import json
from collections.abc import Iterable

from loraseg.storage import ObjectNotFoundError, ObjectStore
from loraseg.storage.store import key_error

__all__ = ["content_digest", "read_etag"]


def content_digest(store: ObjectStore, keys: Iterable[str]) -> str:
    """Return the sha256 over keys and etags in hex; the order of the keys counts.

    Objects are read where a listing has no etags, as in a folder. An object that cannot be read
    contributes its key only.

    Raises:
        StoreError: The store cannot be read.
    """
    keys = list(keys)
    selected = set(keys)
    listed = {entry.key: entry.etag for entry in store.list_objects() if entry.key in selected}
    etags = [(key, listed.get(key) or read_etag(store, key)) for key in keys]
    return hashlib.sha256(json.dumps(etags).encode()).hexdigest()


def read_etag(store: ObjectStore, key: str) -> str | None:
    """Return the etag of an object by reading it; None if the key is invalid or has no object.

    Raises:
        StoreError: The store cannot be read.
    """
    if key_error(key):
        return None
    try:
        return store.get_with_etag(key)[1]
    except ObjectNotFoundError:
        return None
