"""Watch a library: load each new generation while the current one stays in use, then replace it."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

from loraseg.errors import IntegrityError, LorasegError, ServiceError
from loraseg.inference.adapter_ref import AdapterFailure
from loraseg.inference.snapshot import AdapterFilter, LibrarySnapshot, build_snapshot
from loraseg.library.catalog import Library
from loraseg.library.records import CatalogHead

__all__ = ["LibraryStatus", "LibraryWatcher"]

logger = logging.getLogger(__name__)

_UNREACHABLE_MESSAGE = "the store cannot be reached"
_DAMAGED_MESSAGE = "the newest catalog is missing or damaged"
_UNEXPECTED_MESSAGE = "the newest catalog could not be read"


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryStatus:
    """State of a watched library.

    Attributes:
        name: Name of the library in the service.
        snapshot: The generation in use; None before the first is loaded.
        checked_at: ``time.time()`` when the store last confirmed that it is the newest.
        problem: Why the latest check failed, for clients; None if it succeeded.
        quarantined: Adapters of the snapshot that are out of service now.
    """

    name: str
    snapshot: LibrarySnapshot | None
    checked_at: float | None
    problem: str | None
    quarantined: tuple[AdapterFailure, ...]


class LibraryWatcher:
    """Watches one library in its own thread. Thread-safe.

    If the store is down, at the start or later, or a new catalog is damaged, the generation in use
    stays and the problem is reported.
    """

    # How long an adapter that could not be loaded is out of service.
    UNREACHABLE_QUARANTINE_S: ClassVar[float] = 5.0
    BROKEN_QUARANTINE_S: ClassVar[float] = 30.0

    def __init__(
        self, library: Library, *, name: str, adapter_filter: AdapterFilter, poll_s: float
    ) -> None:
        """Create a watcher; nothing is read before :meth:`start` or :meth:`refresh`.

        Args:
            library: On a store with a short retry timeout, so that problems are reported soon.
            name: Name of the library in the service.
            adapter_filter: Which adapters fit.
            poll_s: Seconds between checks of the library's HEAD.
        """
        self.name = name
        self._library, self._adapter_filter, self._poll_s = library, adapter_filter, poll_s
        self._snapshot: LibrarySnapshot | None = None
        self._head: CatalogHead | None = None
        self._checked_at: float | None = None
        self._problem: str | None = None
        self._rejected_head: tuple[CatalogHead | None, float] = None, 0.0
        self._quarantine: dict[tuple[str, int | str], tuple[AdapterFailure, float]] = {}
        self._poll_lock, self._quarantine_lock = threading.Lock(), threading.Lock()
        self._closed, self._loaded = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._poll_loop, name=f"library-{name}", daemon=True)

    def start(self) -> "LibraryWatcher":
        """Start the thread and return the watcher."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop the thread; the snapshot stays usable."""
        self._closed.set()

    @property
    def adapter_filter(self) -> AdapterFilter:
        """Which adapters fit."""
        return self._adapter_filter

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first generation; return whether one is loaded."""
        return self._loaded.wait(timeout_s)

    def snapshot(self) -> LibrarySnapshot:
        """Return the generation in use.

        Raises:
            ServiceError: ``not_ready``: none has been loaded yet.
        """
        snapshot = self._snapshot
        if snapshot is None:
            reason = self._problem or "it is being loaded"
            raise ServiceError(
                "not_ready", f"library {self.name!r} is not ready: {reason}", retry_after_s=2.0
            )
        return snapshot

    def refresh(self) -> LibraryStatus:
        """Check for a newer generation now; retry quarantined adapters and rejected catalogs."""
        with self._quarantine_lock:
            self._quarantine = {}
        with self._poll_lock:
            self._rejected_head = None, 0.0
            self._poll_once()
        return self.status()

    def quarantine(self, failure: AdapterFailure) -> None:
        """Take one version of an adapter out of service for a limited time."""
        duration_s = (
            self.UNREACHABLE_QUARANTINE_S
            if failure.kind == "unreachable"
            else self.BROKEN_QUARANTINE_S
        )
        logger.warning(
            "library %r: %s version %s is out of service for %.0f s: %s",
            self.name,
            failure.name,
            failure.version,
            duration_s,
            failure.reason,
        )
        until = time.monotonic() + duration_s
        with self._quarantine_lock:
            self._quarantine = {
                **self._quarantine,
                (failure.name, failure.version): (failure, until),
            }

    def quarantined(self, snapshot: LibrarySnapshot) -> tuple[AdapterFailure, ...]:
        """Return the adapters of a snapshot that are out of service now, ordered by name."""
        if not self._quarantine:
            return ()
        now = time.monotonic()
        with self._quarantine_lock:
            active = {key: item for key, item in self._quarantine.items() if item[1] > now}
            self._quarantine = active
        entries = snapshot.entries
        return tuple(
            failure
            for (name, version), (failure, _) in sorted(active.items())
            if name in entries and entries[name].version == version
        )

    def status(self) -> LibraryStatus:
        """Return the current state."""
        snapshot = self._snapshot
        return LibraryStatus(
            name=self.name,
            snapshot=snapshot,
            checked_at=self._checked_at,
            problem=self._problem,
            quarantined=() if snapshot is None else self.quarantined(snapshot),
        )

    def _poll_loop(self) -> None:
        while not self._closed.is_set():
            with self._poll_lock:
                self._poll_once()
            self._closed.wait(self._poll_s)

    def _poll_once(self) -> None:
        """Compare the store's HEAD with the one in use; call with ``_poll_lock`` held."""
        try:
            head = self._library.head()
            rejected, until = self._rejected_head
            if head == rejected and time.monotonic() < until:
                self._problem = _DAMAGED_MESSAGE
                return
            if head != self._head:
                self._load_snapshot(head)
        except IntegrityError as error:
            self._set_problem(_DAMAGED_MESSAGE, error)
        except LorasegError as error:
            self._set_problem(_UNREACHABLE_MESSAGE, error)
        except Exception as error:  # noqa: BLE001  no catalog may end the thread
            self._set_problem(_UNEXPECTED_MESSAGE, error)
        else:
            self._checked_at, self._problem = time.time(), None

    def _load_snapshot(self, head: CatalogHead) -> None:
        if self._head is not None and head.generation == 0:
            raise IntegrityError(f"{self._library.uri}: its HEAD is gone")
        started = time.perf_counter()
        try:
            published = self._library.entries_at(head)
            snapshot = build_snapshot(self.name, head.generation, published, self._adapter_filter)
        except IntegrityError:
            # Not read again at every check: the catalog of a large library has many megabytes.
            self._rejected_head = head, time.monotonic() + self.BROKEN_QUARANTINE_S
            raise
        self._snapshot, self._head = snapshot, head
        self._loaded.set()
        logger.info(
            "library %r: generation %d with %d adapters in use after %.2f s",
            self.name,
            head.generation,
            len(snapshot.entries),
            time.perf_counter() - started,
        )

    def _set_problem(self, problem: str, error: Exception) -> None:
        if problem != self._problem:
            logger.warning("library %r: %s: %s", self.name, problem, error)
        self._problem = problem
