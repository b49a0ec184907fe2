"""Object storage behind one protocol: a folder or an S3-compatible bucket."""

from loraseg.storage.backoff import backoff_s
from loraseg.storage.local import LocalStore
from loraseg.storage.store import (
    RETRY_TIMEOUT_S,
    SHORT_RETRY_TIMEOUT_S,
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
)
from loraseg.storage.uri import (
    absolute_uri,
    local_path,
    open_parent_store,
    open_store,
    probe_conditional_writes,
    split_uri,
)

__all__ = [
    "RETRY_TIMEOUT_S",
    "SHORT_RETRY_TIMEOUT_S",
    "LocalStore",
    "ObjectInfo",
    "ObjectNotFoundError",
    "ObjectStore",
    "absolute_uri",
    "backoff_s",
    "local_path",
    "open_parent_store",
    "open_store",
    "probe_conditional_writes",
    "split_uri",
]
