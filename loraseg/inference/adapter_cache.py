"""The adapters that a segmenter selects from, and a cache of their weights.

The library package is not imported here: a retriever over a store, or a list in a test, satisfies
the protocols below.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from loraseg.adapters.packed import PackedAdapter
from loraseg.errors import LorasegError
from loraseg.inference.adapter_ref import AdapterEntry, AdapterFailure, AdapterUnavailableError
from loraseg.tensor_types import Float, ndarray

__all__ = [
    "AdapterCache",
    "AdapterPool",
    "AdapterRetriever",
    "CacheStats",
    "RetrievedAdapter",
    "load_each",
]


@runtime_checkable
class RetrievedAdapter(Protocol):
    """One retrieved adapter."""

    @property
    def entry(self) -> AdapterEntry:
        """The adapter."""
        ...

    @property
    def distance(self) -> float:
        """Euclidean distance of the image's embedding to the adapter's centroid."""
        ...

    @property
    def weight(self) -> float:
        """Mixing weight in [0, 1]."""
        ...


@runtime_checkable
class AdapterRetriever(Protocol):
    """Finds the adapters nearest to image embeddings."""

    def retrieve_batch(
        self, embeddings: Any, k: int, temperature: float, exclude: Collection[str] = ()
    ) -> Sequence[Sequence[RetrievedAdapter]]:
        """Return at most ``k`` adapters for each embedding (n, d), none named in ``exclude``.

        The nearest is first, and the weights sum to 1.
        """
        ...

    def distances(self, embeddings: Any) -> Float[ndarray, "n entries"]:
        """Return the Euclidean distance of every embedding (n, d) to every entry."""
        ...


@dataclass(frozen=True)
class AdapterPool:
    """All adapters that fit one base and encoder.

    Attributes:
        entries: In catalog order.
        load: Returns the weights of an entry; usually an :class:`AdapterCache`.
        retriever: Searches ``entries``; None if there are none.
        empty_reason: Reason given in explanations if ``entries`` is empty.
    """

    entries: Sequence[AdapterEntry]
    load: Callable[[Any], PackedAdapter]
    retriever: AdapterRetriever | None
    empty_reason: str = "the library is empty"

    @cached_property
    def by_name(self) -> Mapping[str, AdapterEntry]:
        """The entries by name."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all entries."""
        return frozenset(self.by_name)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Content of a cache, and its counters since it was created.

    Attributes:
        resident: Adapters in memory.
        size_bytes: Size of the adapters in memory.
        hits: Requests for an adapter that was in memory or being loaded by another thread.
        misses: Loads that were started.
        evictions: Adapters that were dropped for others.
        failures: Loads that raised an error.
        load_seconds: Sum over all loads, including failed and parallel ones.
    """

    resident: int
    size_bytes: int
    hits: int
    misses: int
    evictions: int
    failures: int
    load_seconds: float


@dataclass(eq=False, slots=True)
class _Slot:
    """One adapter of the cache, loaded or being loaded."""

    digest: str
    pins: int = 0
    adapter: PackedAdapter | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class AdapterCache:
    """Keeps the most recently used adapters within a limit in bytes. Thread-safe.

    The key is the digest, so that a name with a new version never gives the old weights. Threads
    that need the same adapter at once load it once; different adapters are loaded in parallel.
    """

    def __init__(
        self, load: Callable[[Any], PackedAdapter], *, limit_bytes: int = 512 * 2**20
    ) -> None:
        self._load = load
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        # By digest, least recently used first. The lock protects this and all counters.
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._resident = self._size_bytes = 0
        self._hits = self._misses = self._evictions = self._failures = 0
        self._load_seconds = 0.0

    def __call__(self, entry: AdapterEntry) -> PackedAdapter:
        """Return the entry's adapter, loading it if it is not in memory.

        Raises:
            LorasegError: As raised by the load; the next call tries again.
        """
        slot, adapter = self._pin(entry)
        self._release([slot])
        return adapter

    @contextmanager
    def hold(self, entries: Sequence[AdapterEntry]) -> Generator[list[PackedAdapter]]:
        """Load the adapters of entries and keep them in memory until the block ends.

        They count towards the limit. The cache exceeds its limit while the held adapters do.

        Raises:
            AdapterUnavailableError: Some cannot be loaded; it lists all of them.
        """
        slots: list[_Slot] = []

        def load(entry: AdapterEntry) -> PackedAdapter:
            slot, adapter = self._pin(entry)
            slots.append(slot)
            return adapter

        try:
            yield load_each(entries, load)
        finally:
            self._release(slots)

    def stats(self) -> CacheStats:
        """Return all figures, consistent with each other."""
        with self._lock:
            return CacheStats(
                resident=self._resident,
                size_bytes=self._size_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                failures=self._failures,
                load_seconds=self._load_seconds,
            )

    @property
    def size_bytes(self) -> int:
        """Size of the adapters in memory."""
        return self.stats().size_bytes

    def __len__(self) -> int:
        return self.stats().resident

    def __contains__(self, digest: str) -> bool:
        """Return whether an adapter is in memory or being loaded."""
        with self._lock:
            return digest in self._slots

    def _pin(self, entry: AdapterEntry) -> tuple[_Slot, PackedAdapter]:
        """Return the entry's adapter and its slot, which stays until :meth:`_release`."""
        while True:
            with self._lock:
                slot = self._slots.get(entry.digest)
                is_loader = slot is None
                if slot is None:
                    slot = self._slots[entry.digest] = _Slot(entry.digest)
                    self._misses += 1
                else:
                    self._slots.move_to_end(entry.digest)
                    self._hits += 1
                slot.pins += 1
            if is_loader:
                return slot, self._fill(slot, entry)
            slot.done.wait()
            if slot.adapter is not None:
                return slot, slot.adapter
            if isinstance(slot.error, Exception):
                raise slot.error
            # The loading thread was interrupted (BaseException); this thread loads in its place.

    def _fill(self, slot: _Slot, entry: AdapterEntry) -> PackedAdapter:
        start = time.perf_counter()
        try:
            adapter = slot.adapter = self._load(entry)
        except BaseException as error:
            slot.error = error
            raise
        finally:
            with self._lock:
                self._load_seconds += time.perf_counter() - start
                self._finish(slot)
            slot.done.set()
        return adapter

    def _finish(self, slot: _Slot) -> None:
        if slot.adapter is None:
            self._failures += 1
            del self._slots[slot.digest]
            return
        self._resident += 1
        self._size_bytes += slot.adapter.nbytes
        self._evict()

    def _release(self, slots: Sequence[_Slot]) -> None:
        with self._lock:
            for slot in slots:
                slot.pins -= 1
            self._evict()

    def _evict(self) -> None:
        """Drop the least recently used. The newest stays, even if it exceeds the limit alone."""
        if self._size_bytes <= self._limit_bytes:
            return
        for slot in list(self._slots.values())[:-1]:
            if slot.adapter is None or slot.pins:
                continue
            del self._slots[slot.digest]
            self._resident -= 1
            self._size_bytes -= slot.adapter.nbytes
            self._evictions += 1
            if self._size_bytes <= self._limit_bytes:
                return


def load_each(
    entries: Sequence[AdapterEntry], load: Callable[[AdapterEntry], PackedAdapter]
) -> list[PackedAdapter]:
    """Load all entries.

    Raises:
        AdapterUnavailableError: Some loads failed; it lists all of them.
    """
    adapters: list[PackedAdapter] = []
    failures: list[AdapterFailure] = []
    first_error: LorasegError | None = None
    for entry in entries:
        try:
            adapters.append(load(entry))
        except LorasegError as error:
            failures.append(AdapterFailure.from_error(entry, error))
            first_error = first_error or error
    if failures:
        raise AdapterUnavailableError(failures) from first_error
    return adapters
