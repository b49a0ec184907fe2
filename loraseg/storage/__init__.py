"""Object storage behind one protocol: a folder or an S3-compatible bucket."""

from loraseg.storage.backoff import backoff_s
from loraseg.storage.local import LocalStore
from loraseg.storage.opening import absolute, open_store, probe_conditional_writes
from loraseg.storage.store import (
    PATIENCE_S,
    SHORT_PATIENCE_S,
    Listed,
    ObjectNotFoundError,
    ObjectStore,
)

__all__ = [
    "PATIENCE_S",
    "SHORT_PATIENCE_S",
    "Listed",
    "LocalStore",
    "ObjectNotFoundError",
    "ObjectStore",
    "absolute",
    "backoff_s",
    "open_store",
    "probe_conditional_writes",
]
