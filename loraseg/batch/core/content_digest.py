"""A digest of what some objects of a store hold."""

import hashlib
import json
from collections.abc import Iterable

from loraseg.storage import ObjectNotFoundError, ObjectStore
from loraseg.storage.store import key_error

__all__ = ["content_digest"]


def content_digest(store: ObjectStore, keys: Iterable[str]) -> str:
    """Return the sha256 over keys and etags, hex; the keys' order counts.

    Objects are read where a listing has no etags, as in a folder. What nobody can read counts by
    its key alone.

    Raises:
        StoreError: The store cannot be read.
    """
    keys = list(keys)
    wanted = set(keys)
    listed = {one.key: one.etag for one in store.list_objects() if one.key in wanted}
    etags = [(key, listed.get(key) or _read_etag(store, key)) for key in keys]
    return hashlib.sha256(json.dumps(etags).encode()).hexdigest()


def _read_etag(store: ObjectStore, key: str) -> str | None:
    if key_error(key):
        return None
    try:
        return store.get_with_etag(key)[1]
    except ObjectNotFoundError:
        return None
