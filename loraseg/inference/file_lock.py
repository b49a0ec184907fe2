"""A lock between the processes of one machine that outlives none of its holders."""

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["locked", "remove_if_free"]

_POLL_S = 0.02


@contextmanager
def locked(path: Path, timeout_s: float) -> Generator[bool]:
    """Hold the lock of a file, which is made for it and removed after it.

    The kernel frees the lock when its holder dies; threads of one process keep each other out too.
    Where the file system allows no such file, or another holds it for longer than our patience,
    the block runs without it.

    Args:
        path: The file; its folder must exist.
        timeout_s: 0 or more.

    Yields:
        Whether the lock is held.
    """
    try:
        descriptor = _acquire(path, timeout_s)
    except OSError:
        descriptor = None
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            # In this order: while we hold it, no other can take this very file for locked by it.
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def remove_if_free(path: Path) -> None:
    """Remove a lock file whose holder died."""
    with locked(path, 0.0):
        pass


def _acquire(path: Path, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        is_ours = False
        try:
            is_ours = _try_lock(descriptor) and _is_same_file(path, descriptor)
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            return descriptor
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_S)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(path: Path, descriptor: int) -> bool:
    """Tell whether the file is still there: a lock on one that was removed keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
