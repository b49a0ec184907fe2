"""The one protocol of object storage, and the rules for keys that hold on every store."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from loraseg.errors import StoreError

__all__ = [
    "RESERVED_PREFIX",
    "RETRY_TIMEOUT_S",
    "SHORT_RETRY_TIMEOUT_S",
    "ObjectInfo",
    "ObjectNotFoundError",
    "ObjectStore",
    "check_key",
    "check_prefix",
    "key_error",
]

# How long a call to a remote store tries again before it fails: a server that restarts takes
# seconds, one that moves to another machine a minute.
RETRY_TIMEOUT_S = 120.0
# Where a person waits, or where work can go on without the store.
SHORT_RETRY_TIMEOUT_S = 15.0

RESERVED_PREFIX = ".loraseg-"
# S3 allows 1024 bytes for bucket prefix and key together, file systems 255 for one segment,
# which a temporary name must fit into as well.
_MAX_KEY_BYTES = 900
_MAX_SEGMENT_BYTES = 200


class ObjectNotFoundError(StoreError, LookupError):
    """The store holds no object under that key."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing shows it; ``etag`` is None where only reading the object tells."""

    key: str
    size_bytes: int
    etag: str | None


@runtime_checkable
class ObjectStore(Protocol):
    """Whole objects under relative, "/"-separated keys.

    A write that returned is durable and visible to every reader; a reader sees the bytes of one
    write, never a mixture. Every method raises :class:`~loraseg.errors.StoreError` when the store
    cannot be reached or refuses, or when the key breaks the rules of :func:`check_key`.
    """

    @property
    def uri(self) -> str:
        """Where the store is; ``open_store(store.uri)`` opens it again."""
        ...

    def get(self, key: str) -> bytes:
        """Return the object's bytes.

        Raises:
            ObjectNotFoundError: There is no such object.
        """
        ...

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """Return the object's bytes and the etag that belongs to exactly these bytes.

        Raises:
            ObjectNotFoundError: There is no such object.
        """
        ...

    def put(self, key: str, data: bytes) -> str:
        """Write the object, replacing what was there, and return its etag."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless the key is taken; of any number of racing writers one wins."""
        ...

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Replace the object if it still has ``etag``; False when it has changed or is gone.

        After a broken connection False can also mean that the write landed and was overwritten
        before it could be confirmed, so callers re-read and re-apply an idempotent change.
        """
        ...

    def exists(self, key: str) -> bool:
        """Return whether there is an object under the key."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that start with ``prefix`` (any string), in code point order."""
        ...

    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield what :meth:`list` does, with sizes and, where they cost nothing, etags.

        Keys come as they are; whether they follow the rules is for the caller to find out.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object; no error when there is none."""
        ...

    def with_prefix(self, prefix: str) -> "ObjectStore":
        """Return the same store seen from below ``prefix``, a key without trailing slash."""
        ...

    def with_retry_timeout(self, timeout_s: float) -> "ObjectStore":
        """Return the same store with calls that try again for so many seconds.

        By default it is :data:`PATIENCE_S`; only faults that may pass are tried again.
        """
        ...


def check_key(key: str) -> str:
    """Return ``key`` if every store can hold it.

    A key is relative, has at most 900 bytes of UTF-8 and 200 a segment; no segment is empty,
    ``.``, ``..`` or starts with ``.loraseg-``; there are no control characters and no backslash.

    Raises:
        StoreError: The key breaks one of these rules.
    """
    check_prefix(key)
    if not key:
        raise StoreError("an object key must not be empty")
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise StoreError(f"object key {key!r}: segment {segment!r} is not allowed")
        if segment.startswith(RESERVED_PREFIX):
            raise StoreError(f"object key {key!r}: names with {RESERVED_PREFIX!r} are reserved")
        if len(segment.encode()) > _MAX_SEGMENT_BYTES:
            raise StoreError(f"object key {key[:80]!r}...: a segment exceeds 200 bytes")
    return key


def key_error(key: str) -> str | None:
    """Return why no store takes a key; None if each does.

    A listing may name such keys: any program can write into a bucket or a folder.
    """
    try:
        check_key(key)
    except StoreError as error:
        return str(error)
    return None


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if keys that follow the rules of :func:`check_key` can start with it.

    Raises:
        StoreError: It cannot be the beginning of a key.
    """
    try:
        size_bytes = len(prefix.encode())
    except UnicodeEncodeError as error:
        raise StoreError(f"object key {prefix!r}: not valid Unicode") from error
    if size_bytes > _MAX_KEY_BYTES:
        raise StoreError(f"object key {prefix[:80]!r}...: {size_bytes} bytes, at most 900")
    if any(ord(char) < 32 or ord(char) == 127 or char == "\\" for char in prefix):
        raise StoreError(f"object key {prefix!r}: control characters and backslash not allowed")
    if any(segment in ("", ".", "..") for segment in prefix.split("/")[:-1]):
        raise StoreError(f"object key {prefix!r}: absolute, empty, '.' or '..' segment")
    return prefix
