"""A library that is followed: new generations are loaded beside the one in use, then swapped in."""

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
    """What is known of a followed library.

    Attributes:
        name: The service's name for it.
        snapshot: The generation in use; None before the first is loaded.
        checked_at: When the store last confirmed that it is the newest, as ``time.time()``.
        problem: Why the latest look failed, in words for a client; None if it did not.
        quarantined: Adapters of the shelf that are set aside now.
    """

    name: str
    snapshot: LibrarySnapshot | None
    checked_at: float | None
    problem: str | None
    quarantined: tuple[AdapterFailure, ...]


class LibraryWatcher:
    """Follows one library in a thread of its own. All methods may be called from any thread.

    The store may be down, at the start or later: the generation in use stays, and the problem is
    reported. The same holds for a generation whose catalog is damaged.
    """

    # How long an adapter that failed is left alone before it is tried again.
    UNREACHABLE_QUARANTINE_S: ClassVar[float] = 5.0
    BROKEN_QUARANTINE_S: ClassVar[float] = 30.0

    def __init__(
        self, library: Library, *, name: str, adapter_filter: AdapterFilter, poll_s: float
    ) -> None:
        """Prepare; nothing is read before :meth:`start` or :meth:`refresh`.

        Args:
            library: On a store of little patience, so that problems are reported soon.
            name: The service's name for it.
            adapter_filter: Which adapters fit.
            poll_s: How often its HEAD is read.
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
        """Follow the library from now on."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop following; what is loaded stays."""
        self._closed.set()

    @property
    def adapter_filter(self) -> AdapterFilter:
        """Which adapters fit."""
        return self._adapter_filter

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first generation; return whether there is one."""
        return self._loaded.wait(timeout_s)

    def snapshot(self) -> LibrarySnapshot:
        """Return the generation in use.

        Raises:
            ServiceError: ``not_ready``: none has been loaded yet.
        """
        shelf = self._snapshot
        if shelf is None:
            reason = self._problem or "it is being loaded"
            raise ServiceError(
                "not_ready", f"library {self.name!r} is not ready: {reason}", retry_after_s=2.0
            )
        return shelf

    def refresh(self) -> LibraryStatus:
        """Look for a newer generation now, and try anew what was set aside or refused."""
        with self._quarantine_lock:
            self._quarantine = {}
        with self._poll_lock:
            self._rejected_head = None, 0.0
            self._poll_once()
        return self.status()

    def quarantine(self, failure: AdapterFailure) -> None:
        """Take one version of an adapter out of service for a while."""
        for_s = (
            self.UNREACHABLE_QUARANTINE_S
            if failure.kind == "unreachable"
            else self.BROKEN_QUARANTINE_S
        )
        logger.warning(
            "library %r: %s version %s is out of service for %.0f s: %s",
            self.name,
            failure.name,
            failure.version,
            for_s,
            failure.reason,
        )
        until = time.monotonic() + for_s
        with self._quarantine_lock:
            self._quarantine = {
                **self._quarantine,
                (failure.name, failure.version): (failure, until),
            }

    def quarantined(self, snapshot: LibrarySnapshot) -> tuple[AdapterFailure, ...]:
        """Return the adapters of a shelf that are set aside now, ordered by name."""
        if not self._quarantine:
            return ()
        now = time.monotonic()
        with self._quarantine_lock:
            aside = {key: kept for key, kept in self._quarantine.items() if kept[1] > now}
            self._quarantine = aside
        entries = snapshot.entries
        return tuple(
            failure
            for (name, version), (failure, _) in sorted(aside.items())
            if name in entries and entries[name].version == version
        )

    def status(self) -> LibraryStatus:
        """Return what is known."""
        shelf = self._snapshot
        return LibraryStatus(
            name=self.name,
            snapshot=shelf,
            checked_at=self._checked_at,
            problem=self._problem,
            quarantined=() if shelf is None else self.quarantined(shelf),
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
            refused, until = self._rejected_head
            if head == refused and time.monotonic() < until:
                self._problem = _DAMAGED_MESSAGE
                return
            if head != self._head:
                self._load_snapshot(head)
        except IntegrityError as error:
            self._set_problem(_DAMAGED_MESSAGE, error)
        except LorasegError as error:
            self._set_problem(_UNREACHABLE_MESSAGE, error)
        except Exception as error:  # noqa: BLE001  the thread must outlive any catalog
            self._set_problem(_UNEXPECTED_MESSAGE, error)
        else:
            self._checked_at, self._problem = time.time(), None

    def _load_snapshot(self, head: CatalogHead) -> None:
        if self._head is not None and head.generation == 0:
            raise IntegrityError(f"{self._library.uri}: its HEAD is gone")
        started = time.perf_counter()
        try:
            published = self._library.entries_at(head)
            shelf = build_snapshot(self.name, head.generation, published, self._adapter_filter)
        except IntegrityError:
            # Not read again at every look: the catalog of a large library has many megabytes.
            self._rejected_head = head, time.monotonic() + self.BROKEN_QUARANTINE_S
            raise
        self._snapshot, self._head = shelf, head
        self._loaded.set()
        logger.info(
            "library %r: generation %d with %d adapters in use after %.2f s",
            self.name,
            head.generation,
            len(shelf.entries),
            time.perf_counter() - started,
        )

    def _set_problem(self, problem: str, error: Exception) -> None:
        if problem != self._problem:
            logger.warning("library %r: %s: %s", self.name, problem, error)
        self._problem = problem
