"""Packed adapters on this machine's disk, so that an adapter is fetched and laid out only once."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loraseg.adapters.packed import PackedAdapter, read_packed, write_packed
from loraseg.errors import IntegrityError
from loraseg.inference.file_lock import locked, remove_if_free

__all__ = ["AdapterDiskCache"]

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
_LOCK_SUFFIX = ".lock"
_PARTIAL_FILE_AGE_S = 3600.0
# Other processes put files here too: after this share of the limit, look what there is.
_RESCAN_SHARE = 1 / 32


class AdapterDiskCache:
    """A folder of packed adapters by digest, bounded in bytes.

    Any number of processes may share it. What is taken from it is mapped, not read: pages come
    from the disk when they are looked at and go when memory is short. A file may be deleted while
    it is mapped. If the disk fails, adapters simply stay in memory.
    """

    def __init__(
        self, folder: Path, *, limit_bytes: int = 16 * 2**30, lock_timeout_s: float = 30.0
    ) -> None:
        """Use a folder.

        Args:
            folder: Need not exist.
            limit_bytes: Beyond it the longest unused files go. Processes that write at once may
                exceed it by a few percent each.
            lock_timeout_s: How long :meth:`fetch` waits for another that makes the same adapter.
        """
        self._folder, self._limit_bytes, self._lock_timeout_s = folder, limit_bytes, lock_timeout_s
        self._lock = threading.Lock()
        self._size_bytes: int | None = None
        self._unscanned_bytes = 0

    def get_or_create(self, digest: str, create: Callable[[], PackedAdapter]) -> PackedAdapter:
        """Return an adapter from here, else make it and keep it.

        Of all threads and processes that want the same one at once, one makes it while the others
        wait. If it dies, another takes over at once; if it takes longer than our patience, we make
        the adapter too, which costs only time. Its failure is its own: each of the others tries.

        Raises:
            IntegrityError: What was made has another digest.
            Exception: Whatever ``create`` raises.
        """
        packed = self.get(digest)
        if packed is not None:
            return packed
        with suppress(OSError):  # a folder that cannot be made still serves
            self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._folder / f".{digest}{_LOCK_SUFFIX}"
        with locked(lock, self._lock_timeout_s) as is_first:
            if not is_first:
                logger.warning("adapter %s: no lock to be had, making it beside others", digest)
            packed = self.get(digest)
            if packed is not None:
                return packed
            made = create()
            if made.digest != digest:
                raise IntegrityError(f"adapter: got digest {made.digest}, expected {digest}")
            return self.put(made)

    def get(self, digest: str) -> PackedAdapter | None:
        """Return an adapter with its bytes checked, None if it is not here or not usable."""
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
        with suppress(OSError):  # a folder that cannot be written still serves
            os.utime(path)  # the newest use decides what goes first
        return packed

    def put(self, packed: PackedAdapter) -> PackedAdapter:
        """Keep an adapter and return it as it is kept, mapped from the disk."""
        path = self._path(packed.digest)
        try:
            write_packed(path, packed)
            with self._lock:
                self._enforce_limit(path.stat().st_size)
            return read_packed(path)
        except (IntegrityError, OSError) as error:
            logger.warning("packed adapter not kept: %s", error)
            return packed

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise IntegrityError(f"adapter digest {digest!r}: expected 64 hex digits")
        return self._folder / f"{digest}{_SUFFIX}"

    def _enforce_limit(self, added_bytes: int) -> None:
        """Look through the folder only when it may have grown beyond its limit."""
        self._unscanned_bytes += added_bytes
        if (
            self._size_bytes is not None
            and self._size_bytes + added_bytes <= self._limit_bytes
            and self._unscanned_bytes <= _RESCAN_SHARE * self._limit_bytes
        ):
            self._size_bytes += added_bytes
            return
        self._unscanned_bytes = 0
        found: list[tuple[float, int, Path]] = []
        self._remove_partial_files()
        for path in self._folder.glob(f"*{_SUFFIX}"):
            try:
                state = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            found.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in found)
        # A little more than needed, so that not every adapter from now on has to look around.
        room = self._limit_bytes if total <= self._limit_bytes else 0.9 * self._limit_bytes
        for _, size, path in sorted(found)[:-1]:
            if total <= room:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._size_bytes = total

    def _remove_partial_files(self) -> None:
        """Remove what writers that were killed have left."""
        for path in self._folder.glob(f".*{_SUFFIX}.*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _PARTIAL_FILE_AGE_S:
                    path.unlink()
        for path in self._folder.glob(f".*{_LOCK_SUFFIX}"):
            remove_if_free(path)
