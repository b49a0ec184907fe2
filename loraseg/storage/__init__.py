"""Object storage behind one protocol: a folder or an S3-compatible bucket."""

from loraseg.storage.local import LocalStore
from loraseg.storage.opening import absolute, open_store, probe_conditional_writes
from loraseg.storage.store import ObjectNotFoundError, ObjectStore

__all__ = [
    "LocalStore",
    "ObjectNotFoundError",
    "ObjectStore",
    "absolute",
    "open_store",
    "probe_conditional_writes",
]
