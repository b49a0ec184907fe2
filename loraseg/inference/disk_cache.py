"""Packed adapters on this machine's disk: each is fetched and packed once for all processes."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from loraseg.adapters.packed import PackedAdapter, read_packed, write_packed
from loraseg.errors import IntegrityError

__all__ = ["AdapterDiskCache"]

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_LOCK_SUFFIX = ".lock"
_LOCK_POLL_S = 0.02
# Age at which partial files of killed writers and unused lock files are removed. A lock that is
# held for longer is removed too: then a second process may create the same adapter.
_STALE_FILE_AGE_S = 3600.0
# Other processes add files too: after this share of the limit, the folder is scanned again.
_RESCAN_SHARE = 1 / 32


class AdapterDiskCache:
    """A folder of packed adapters named by digest, with a limit in bytes.

    Any number of threads and processes may share it. Adapters are memory-mapped: pages are read
    when they are used and dropped when memory is short. A file may be deleted while it is mapped.
    If the disk fails, adapters stay in memory.
    """

    def __init__(
        self, folder: Path, *, limit_bytes: int = 16 * 2**30, lock_timeout_s: float = 30.0
    ) -> None:
        """Use a folder.

        Args:
            folder: Created when it is needed.
            limit_bytes: Beyond it the least recently used files are deleted. Processes that write
                at the same time may exceed it by a few percent each.
            lock_timeout_s: How long :meth:`get_or_create` waits for another thread or process that
                creates the same adapter.
        """
        self._folder, self._limit_bytes, self._lock_timeout_s = folder, limit_bytes, lock_timeout_s
        self._lock = threading.Lock()
        self._size_bytes: int | None = None
        self._unscanned_bytes = 0

    def get_or_create(self, digest: str, create: Callable[[], PackedAdapter]) -> PackedAdapter:
        """Return an adapter from the folder, or create it and keep it.

        Of all threads and processes that need the same adapter, one creates it while the others
        wait. If its process is killed, another takes over at once; if it takes longer than
        ``lock_timeout_s``, the others create the adapter too. After an error of ``create``, each of
        the others calls its own.

        Raises:
            IntegrityError: The created adapter has another digest.
            Exception: As raised by ``create``.
        """
        packed = self.get(digest)
        if packed is not None:
            return packed
        with suppress(OSError):  # without a folder, adapters stay in memory
            self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked(digest) as is_locked:
            if not is_locked:
                logger.warning("adapter %s: no lock within its timeout, creating it anyway", digest)
            packed = self.get(digest)
            if packed is not None:
                return packed
            created = create()
            if created.digest != digest:
                raise IntegrityError(f"adapter: got digest {created.digest}, expected {digest}")
            return self.put(created)

    def get(self, digest: str) -> PackedAdapter | None:
        """Return an adapter after checking its bytes; None if it is missing or damaged."""
        path = self._path(digest)
        try:
            packed = read_packed(path)
        except FileNotFoundError:
            return None
        except (IntegrityError, OSError) as error:
            logger.warning("packed adapter not usable, fetching it again: %s", error)
            return None
        if packed.digest != digest:
            logger.warning("%s holds adapter %s, fetching it again", path, packed.digest)
            return None
        with suppress(OSError):  # a read-only folder can still be read
            os.utime(path)  # the time of last use decides which file is deleted first
        return packed

    def put(self, packed: PackedAdapter) -> PackedAdapter:
        """Write an adapter and return it memory-mapped; unchanged if the disk fails."""
        path = self._path(packed.digest)
        try:
            write_packed(path, packed)
            with self._lock:
                self._enforce_limit(path.stat().st_size)
            return read_packed(path)
        except (IntegrityError, OSError) as error:
            logger.warning("packed adapter not kept: %s", error)
            return packed

    @contextmanager
    def _locked(self, digest: str) -> Generator[bool]:
        """Hold the lock of an adapter; yield False on a timeout or if the disk has no locks."""
        path = self._folder / f".{digest}{_LOCK_SUFFIX}"
        lock = FileLock(path, timeout=self._lock_timeout_s, poll_interval=_LOCK_POLL_S)
        # filelock.Timeout is an OSError. Before filelock 4, a file system without flock is reported
        # by a NotImplementedError.
        with suppress(OSError, NotImplementedError):
            lock.acquire()
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise IntegrityError(f"adapter digest {digest!r}: expected 64 hex digits")
        return self._folder / f"{digest}{_SUFFIX}"

    def _enforce_limit(self, added_bytes: int) -> None:
        """Scan the folder only when it may have grown beyond its limit."""
        self._unscanned_bytes += added_bytes
        if (
            self._size_bytes is not None
            and self._size_bytes + added_bytes <= self._limit_bytes
            and self._unscanned_bytes <= _RESCAN_SHARE * self._limit_bytes
        ):
            self._size_bytes += added_bytes
            return
        self._unscanned_bytes = 0
        self._remove_stale_files()
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # deleted by another process
                continue
            files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        # Somewhat more than needed, so that not every further adapter causes a scan.
        target = self._limit_bytes if total <= self._limit_bytes else 0.9 * self._limit_bytes
        for _, size, path in sorted(files)[:-1]:
            if total <= target:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._size_bytes = total

    def _remove_stale_files(self) -> None:
        """Remove partial files of killed writers, and lock files that are not used any more."""
        for pattern in (f".*{_SUFFIX}.*", f".*{_LOCK_SUFFIX}"):
            for path in self._folder.glob(pattern):
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > _STALE_FILE_AGE_S:
                        path.unlink()
