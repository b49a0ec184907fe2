"""A folder as object store, safe for any number of processes that share it."""

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

from loraseg.errors import StoreError
from loraseg.storage.store import (
    RESERVED_PREFIX,
    ObjectInfo,
    ObjectNotFoundError,
    check_key,
    check_prefix,
)

__all__ = ["LocalStore"]

_LOCK_NAME = f"{RESERVED_PREFIX}lock"
_LOCK_TIMEOUT_S = 30.0
_LOCK_POLL_S = 0.002
_NO_HARD_LINK_ERRNOS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class LocalStore:
    """Objects as files below ``root``; the etag is the sha256 of the bytes.

    Every write goes to a temporary file, which is flushed to disk and then linked or renamed into
    place. Writes that look before they replace hold a lock on the object's folder (``flock`` on a
    hidden file in it, which also works between NFS clients). Unlike S3, a file system cannot hold
    both ``x`` and ``x/y``: the second of them is refused with a StoreError.
    """

    def __init__(self, root: Path) -> None:
        """Use ``root``, which is created by the first write."""
        self._root = Path(os.path.abspath(root))  # noqa: PTH100 (resolve() would follow links)

    @property
    def uri(self) -> str:
        """Where the store is, as a ``file://`` URI."""
        return self._root.as_uri()

    def __repr__(self) -> str:
        return f"LocalStore({str(self._root)!r})"

    def get(self, key: str) -> bytes:
        """Return the object's bytes."""
        path = self._path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFoundError(f"no object {key!r} in {self.uri}") from error
        except OSError as error:
            raise self._store_error("read", key, error) from error

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """Return the object's bytes and their sha256."""
        data = self.get(key)
        return data, _etag(data)

    def put(self, key: str, data: bytes) -> str:
        """Write the object, replacing what was there, and return its etag."""
        path = self._path(key)
        with self._temporary_file(key, path, data) as temporary, _folder_lock(path.parent):
            temporary.replace(path)
        return _etag(data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless the key is taken; of any number of racing writers one wins."""
        path = self._path(key)
        if path.is_file():
            return False
        with self._temporary_file(key, path, data) as temporary:
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                if path.is_dir():
                    raise
                return False
            except OSError as error:
                if error.errno not in _NO_HARD_LINK_ERRNOS:
                    raise
                return _rename_if_absent(temporary, path)
        return True

    def put_if_match(self, key: str, data: bytes, etag: str) -> bool:
        """Replace the object if it still has ``etag``; False when it has changed or is gone."""
        path = self._path(key)
        if not path.is_file():
            return False
        with self._temporary_file(key, path, data) as temporary, _folder_lock(path.parent):
            if not path.is_file() or _etag(path.read_bytes()) != etag:
                return False
            temporary.replace(path)
        return True

    def exists(self, key: str) -> bool:
        """Return whether there is an object under the key."""
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys that start with ``prefix`` in code point order."""
        check_prefix(prefix)
        yield from self._walk(prefix.rpartition("/")[0], prefix)

    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield keys and sizes of regular files: one that waits for a writer is no object."""
        for key in self.list(prefix):
            try:
                found = (self._root / key).stat()
            except OSError:
                continue  # a link into nowhere, or gone since
            if stat.S_ISREG(found.st_mode):
                yield ObjectInfo(key, found.st_size, None)

    def delete(self, key: str) -> None:
        """Remove the object; no error when there is none."""
        path = self._path(key)
        if not path.is_file():
            return
        try:
            with _folder_lock(path.parent):
                path.unlink(missing_ok=True)
                _fsync_folder(path.parent)
        except OSError as error:
            raise self._store_error("delete", key, error) from error

    def with_prefix(self, prefix: str) -> "LocalStore":
        """Return the same store seen from below ``prefix``."""
        return LocalStore(self._path(prefix))

    def with_retry_timeout(self, timeout_s: float) -> "LocalStore":
        """Return this store: a folder answers at once or not at all."""
        return self

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _walk(self, folder: str, prefix: str) -> Iterator[str]:
        try:
            with os.scandir(self._root / folder) as entries:
                # "/" after folder names makes the order that of whole keys: "a-b" before "a/b".
                names = sorted(f"{e.name}/" if e.is_dir() else e.name for e in entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise self._store_error("list", folder, error) from error
        for name in names:
            key = f"{folder}/{name}" if folder else name
            if name.startswith(RESERVED_PREFIX):
                continue
            if not name.endswith("/"):
                if key.startswith(prefix):
                    yield key
            elif key.startswith(prefix) or prefix.startswith(key):
                yield from self._walk(key[:-1], prefix)

    @contextlib.contextmanager
    def _temporary_file(self, key: str, path: Path, data: bytes) -> Generator[Path]:
        """Yield a complete, flushed temporary file beside ``path``; flush the folder at the end."""
        temporary = path.parent / f"{RESERVED_PREFIX}tmp-{uuid.uuid4().hex}"
        try:
            _make_folder(path.parent)
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
            _fsync_folder(path.parent)
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise StoreError(
                f"cannot write {key!r} to {self.uri}: one of {key!r} and its parents is both a "
                "file and a folder there; a file store cannot hold objects 'x' and 'x/y' at once"
            ) from error
        except StoreError:
            raise
        except OSError as error:
            raise self._store_error("write", key, error) from error

    def _store_error(self, action: str, key: str, error: OSError) -> StoreError:
        return StoreError(f"cannot {action} {key!r} in {self.uri}: {error.strerror or error}")


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _rename_if_absent(temporary: Path, path: Path) -> bool:
    """Stand in for a hard link where the file system has none."""
    with _folder_lock(path.parent):
        if path.exists():
            return False
        temporary.replace(path)
        return True


def _make_folder(folder: Path) -> None:
    """Create the folder and its parents so that they outlive a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Generator[None]:
    """Hold the folder's lock; the kernel frees it when the holder dies."""
    descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{folder / _LOCK_NAME} has been locked for {_LOCK_TIMEOUT_S:.0f} s; "
                        "is another process that writes to this store suspended?"
                    ) from None
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
