"""Opens stores by URI and checks that they support conditional writes."""

import contextlib
import re
import urllib.parse
import uuid
from pathlib import Path

from loraseg.errors import ConfigError, StoreError
from loraseg.storage.local import LocalStore
from loraseg.storage.store import ObjectStore

__all__ = [
    "absolute_uri",
    "local_path",
    "open_parent_store",
    "open_store",
    "probe_conditional_writes",
    "split_uri",
]

_CLEANUP_TIMEOUT_S = 2.0
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_SINGLE_SLASH = re.compile(r"([A-Za-z0-9]{2,}):/(?!/)")


def open_store(uri: str) -> ObjectStore:
    """Open the store at ``file:///folder``, a plain path, or ``s3://bucket/prefix``.

    An S3 store takes endpoint, region and credentials from the standard AWS variables and files
    (``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, ...).
    No connection is made and nothing is created.

    Raises:
        ConfigError: The URI is malformed or of another kind.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStore(Path(absolute_uri(uri)))
    if scheme == "file":
        return LocalStore(_file_path(rest))
    if scheme == "s3":
        return _open_s3(rest)
    raise ConfigError(
        f"store URI of kind {scheme!r}; known kinds: a path, file:///folder, s3://bucket/prefix"
    )


def absolute_uri(uri: str) -> str:
    """Return a URI with a scheme unchanged, and a plain path made absolute.

    Workers and the driver have different current directories.

    Raises:
        ConfigError: The URI is empty or has a single slash after its scheme.
    """
    if not uri:
        raise ConfigError("store URI is empty; expected a path, file:///folder or s3://bucket")
    if mistyped := _SINGLE_SLASH.match(uri):
        kind = mistyped[1]
        raise ConfigError(f"{uri!r}: did you mean {kind}://{uri[mistyped.end() :].lstrip('/')!r}?")
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def split_uri(uri: str) -> tuple[str, str]:
    """Return folder and name of a file such as ``s3://bucket/reports/fog.json``.

    Raises:
        ConfigError: The URI names no file.
    """
    folder, _, name = absolute_uri(uri).rpartition("/")
    if name in ("", ".", "..") or folder.endswith(("://", ":/")):
        raise ConfigError(f"{uri!r}: expected a file, such as reports/fog.json")
    return folder or "/", name


def local_path(spec: str) -> Path:
    """Return the path that a plain path or a ``file://`` URI denotes.

    Raises:
        ConfigError: The ``file://`` URI is malformed.
    """
    if spec.startswith("file://"):
        return _file_path(spec.removeprefix("file://"))
    return Path(spec).expanduser()


def open_parent_store(uri: str) -> tuple[ObjectStore, str]:
    """Return the store and the key of a file.

    Raises:
        ConfigError: The URI names no file, or its scheme is unknown.
    """
    folder, name = split_uri(uri)
    return open_store(folder), name


def probe_conditional_writes(store: ObjectStore) -> None:
    """Check that the store supports conditional writes, which the library requires.

    Writes and deletes a small object below ``probe/``.

    Raises:
        StoreError: The store ignores or rejects a conditional write, or cannot be used.
    """
    key = f"probe/{uuid.uuid4().hex}"
    try:
        problem = _conditional_write_problem(store, key)
    finally:
        # If the store has failed, this may fail too; the first error is the one to report.
        with contextlib.suppress(StoreError):
            store.with_retry_timeout(_CLEANUP_TIMEOUT_S).delete(key)
    if problem:
        raise StoreError(
            f"{store.uri} {problem}, so parallel writers would lose each other's work; use a store "
            "with conditional PutObject (AWS S3, Ceph RGW, a recent MinIO) or a file:// folder"
        )


def _conditional_write_problem(store: ObjectStore, key: str) -> str | None:
    if not store.put_if_absent(key, b"first"):
        return "reports an object under a key that was never written (If-None-Match)"
    if store.put_if_absent(key, b"second"):
        return "ignores If-None-Match: * on PutObject (it overwrote an existing object)"
    if store.put_if_match(key, b"third", "0" * 32):
        return "ignores If-Match on PutObject (it replaced an object under a wrong etag)"
    data, etag = store.get_with_etag(key)
    if data != b"first":
        return "changed an object although it reported a failed condition"
    if not store.put_if_match(key, b"fourth", etag):
        return "rejects If-Match on PutObject even with the right etag"
    return None


def _file_path(rest: str) -> Path:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise ConfigError(f"store URI 'file://{rest}': expected file:///absolute/folder")
    return Path("/" + urllib.parse.unquote(path))


def _open_s3(rest: str) -> ObjectStore:
    # Imported here because boto3 takes 0.3 s to import and file stores do not need it.
    from loraseg.storage.s3 import S3Store

    bucket, _, prefix = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        # The URI is not shown: users paste keys and secrets in place of the host.
        raise ConfigError(
            "store URI s3://...: expected s3://bucket/prefix, the bucket of 2 to 63 letters, "
            "digits, '.', '_' or '-'; credentials belong into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    return S3Store(bucket, prefix.strip("/"))
