"""A library that is followed: new generations are loaded beside the one in use, then swapped in."""

import logging
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

from loraseg.engine.adapter_ref import Failure
from loraseg.engine.shelf import Shelf, Taste, stock
from loraseg.errors import IntegrityError, LorasegError, ServiceError
from loraseg.library.catalog import Library
from loraseg.library.records import Head

__all__ = ["LibraryStatus", "LiveLibrary"]

logger = logging.getLogger(__name__)

_UNREACHABLE = "the store cannot be reached"
_DAMAGED = "the newest catalog is missing or damaged"
_UNEXPECTED = "the newest catalog could not be read"


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryStatus:
    """What is known of a followed library.

    Attributes:
        name: The service's name for it.
        shelf: The generation in use; None before the first is loaded.
        checked_at: When the store last confirmed that it is the newest, as ``time.time()``.
        problem: Why the latest look failed, in words for a client; None if it did not.
        out_of_service: Adapters of the shelf that are set aside now.
    """

    name: str
    shelf: Shelf | None
    checked_at: float | None
    problem: str | None
    out_of_service: tuple[Failure, ...]


class LiveLibrary:
    """Follows one library in a thread of its own. All methods may be called from any thread.

    The store may be down, at the start or later: the generation in use stays, and the problem is
    reported. The same holds for a generation whose catalog is damaged.
    """

    # How long an adapter that failed is left alone before it is tried again.
    UNREACHABLE_S: ClassVar[float] = 5.0
    BROKEN_S: ClassVar[float] = 30.0

    def __init__(self, library: Library, *, name: str, taste: Taste, poll_s: float) -> None:
        """Prepare; nothing is read before :meth:`start` or :meth:`refresh`.

        Args:
            library: On a store of little patience, so that problems are reported soon.
            name: The service's name for it.
            taste: Which adapters fit.
            poll_s: How often its HEAD is read.
        """
        self.name = name
        self._library, self._taste, self._poll_s = library, taste, poll_s
        self._shelf: Shelf | None = None
        self._head: Head | None = None
        self._checked_at: float | None = None
        self._problem: str | None = None
        self._refused: tuple[Head | None, float] = None, 0.0
        self._aside: dict[tuple[str, int], tuple[Failure, float]] = {}
        self._polling, self._setting = threading.Lock(), threading.Lock()
        self._closed, self._loaded = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"library-{name}", daemon=True)

    def start(self) -> "LiveLibrary":
        """Follow the library from now on."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop following; what is loaded stays."""
        self._closed.set()

    @property
    def taste(self) -> Taste:
        """Which adapters fit."""
        return self._taste

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first generation; return whether there is one."""
        return self._loaded.wait(timeout_s)

    def shelf(self) -> Shelf:
        """Return the generation in use.

        Raises:
            ServiceError: ``not_ready``: none has been loaded yet.
        """
        shelf = self._shelf
        if shelf is None:
            reason = self._problem or "it is being loaded"
            raise ServiceError(
                "not_ready", f"library {self.name!r} is not ready: {reason}", retry_after_s=2.0
            )
        return shelf

    def refresh(self) -> LibraryStatus:
        """Look for a newer generation now, and try anew what was set aside or refused."""
        with self._setting:
            self._aside = {}
        with self._polling:
            self._refused = None, 0.0
            self._look()
        return self.status()

    def set_aside(self, failure: Failure) -> None:
        """Take one version of an adapter out of service for a while."""
        for_s = self.UNREACHABLE_S if failure.kind == "unreachable" else self.BROKEN_S
        logger.warning(
            "library %r: %s version %s is out of service for %.0f s: %s",
            self.name,
            failure.name,
            failure.version,
            for_s,
            failure.reason,
        )
        until = time.monotonic() + for_s
        with self._setting:
            self._aside = {**self._aside, (failure.name, failure.version): (failure, until)}

    def out_of_service(self, shelf: Shelf) -> tuple[Failure, ...]:
        """Return the adapters of a shelf that are set aside now, ordered by name."""
        if not self._aside:
            return ()
        now = time.monotonic()
        with self._setting:
            aside = {key: kept for key, kept in self._aside.items() if kept[1] > now}
            self._aside = aside
        entries = shelf.entries
        return tuple(
            failure
            for (name, version), (failure, _) in sorted(aside.items())
            if name in entries and entries[name].version == version
        )

    def status(self) -> LibraryStatus:
        """Return what is known."""
        shelf = self._shelf
        return LibraryStatus(
            name=self.name,
            shelf=shelf,
            checked_at=self._checked_at,
            problem=self._problem,
            out_of_service=() if shelf is None else self.out_of_service(shelf),
        )

    def _follow(self) -> None:
        while not self._closed.is_set():
            with self._polling:
                self._look()
            self._closed.wait(self._poll_s)

    def _look(self) -> None:
        """Compare the store's HEAD with the one in use; call with ``_polling`` held."""
        try:
            head = self._library.head()
            refused, until = self._refused
            if head == refused and time.monotonic() < until:
                self._problem = _DAMAGED
                return
            if head != self._head:
                self._load(head)
        except IntegrityError as error:
            self._report(_DAMAGED, error)
        except LorasegError as error:
            self._report(_UNREACHABLE, error)
        except Exception as error:  # noqa: BLE001  the thread must outlive any catalog
            self._report(_UNEXPECTED, error)
        else:
            self._checked_at, self._problem = time.time(), None

    def _load(self, head: Head) -> None:
        if self._head is not None and head.generation == 0:
            raise IntegrityError(f"{self._library.uri}: its HEAD is gone")
        started = time.perf_counter()
        try:
            published = self._library.entries_at(head)
            shelf = stock(self.name, head.generation, published, self._taste)
        except IntegrityError:
            # Not read again at every look: the catalog of a large library has many megabytes.
            self._refused = head, time.monotonic() + self.BROKEN_S
            raise
        self._shelf, self._head = shelf, head
        self._loaded.set()
        logger.info(
            "library %r: generation %d with %d adapters in use after %.2f s",
            self.name,
            head.generation,
            len(shelf.entries),
            time.perf_counter() - started,
        )

    def _report(self, problem: str, error: Exception) -> None:
        if problem != self._problem:
            logger.warning("library %r: %s: %s", self.name, problem, error)
        self._problem = problem
