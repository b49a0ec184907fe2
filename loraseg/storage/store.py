"""The protocol of object stores, and the rules for keys."""

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

# How long a call to a remote store is retried: a server needs seconds to restart, and a minute to
# move to another machine.
RETRY_TIMEOUT_S = 120.0
# For interactive calls, and calls whose failure does not stop the work.
SHORT_RETRY_TIMEOUT_S = 15.0

RESERVED_PREFIX = ".loraseg-"
# S3 allows 1024 bytes for prefix and key together; file systems allow 255 for a segment, including
# the suffix of a temporary name.
_MAX_KEY_BYTES = 900
_MAX_SEGMENT_BYTES = 200


class ObjectNotFoundError(StoreError, LookupError):
    """The store has no object under this key."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An entry of a listing; ``etag`` is None if the store does not list etags."""

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
        """URI of the root; ``open_store(store.uri)`` opens the store again."""
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
        """Write the object, replacing an existing one, and return its etag."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless the key exists; of concurrent writers exactly one succeeds."""
        ...

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Replace the object if it still has ``etag``; False if it has changed or was deleted.

        After a broken connection, False can also mean that the write succeeded and was overwritten
        before it was confirmed, so callers read again and reapply an idempotent change.
        """
        ...

    def exists(self, key: str) -> bool:
        """Return whether there is an object under the key."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that start with ``prefix`` (any string), in code point order."""
        ...

    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the keys of :meth:`list` with sizes, and etags if listing them is free.

        Keys are not checked against :func:`check_key`; other programs may have written them.
        """
        ...

    def delete(self, key: str) -> None:
        """Delete the object; a missing object is not an error."""
        ...

    def with_prefix(self, prefix: str) -> "ObjectStore":
        """Return the store rooted at ``prefix``, a key without trailing slash."""
        ...

    def with_retry_timeout(self, timeout_s: float) -> "ObjectStore":
        """Return the store with another retry timeout, by default :data:`RETRY_TIMEOUT_S`.

        Only transient failures are retried.
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
    """Return the reason why a key is invalid; None if it is valid.

    Listings may contain such keys, written by other programs.
    """
    try:
        check_key(key)
    except StoreError as error:
        return str(error)
    return None


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if keys that follow the rules of :func:`check_key` can start with it.

    Raises:
        StoreError: No valid key starts with it.
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
