"""The adapters that an adaptive segmenter chooses from.

The library is not imported here. What is needed of it comes in through these few protocols, so
that a store, a cache shared by a cluster or a list in a test can stand behind them.
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
from loraseg.tensor_types import ndarray

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
        """Which adapter."""
        ...

    @property
    def distance(self) -> float:
        """Euclidean, from the image's embedding to the adapter's centroid."""
        ...

    @property
    def weight(self) -> float:
        """Mixing weight in [0, 1]."""
        ...


@runtime_checkable
class AdapterRetriever(Protocol):
    """Finds the adapters nearest to image embeddings, nearest first, weights summing to one."""

    def retrieve_batch(
        self, embeddings: Any, k: int, temperature: float, exclude: Collection[str] = ()
    ) -> Sequence[Sequence[RetrievedAdapter]]:
        """Return at most k neighbours an embedding, none of the names in ``exclude``."""
        ...

    def distances(self, embeddings: Any) -> ndarray:
        """Return the distance of every embedding to every entry, (n, entries)."""
        ...


@dataclass(frozen=True)
class AdapterPool:
    """All adapters that fit one base.

    Attributes:
        entries: In catalog order.
        load: Gives the weights of an entry; usually an :class:`AdapterCache`.
        retriever: Over ``entries``; None when there are none.
        empty_reason: Why ``entries`` is empty, for the explanation.
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
    """What a cache holds now, and what it did since it was made.

    Attributes:
        resident: Adapters in memory.
        size_bytes: Of those.
        hits: Adapters asked for that were there, or on their way by another thread.
        misses: Loads that were begun.
        evictions: Adapters that had to make room.
        failures: Loads that ended in an error.
        load_seconds: All loads together, failed ones too; parallel ones count each.
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
    """One adapter of the cache, there or on its way."""

    digest: str
    pins: int = 0
    adapter: PackedAdapter | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class AdapterCache:
    """Keeps the most recently used adapters within a budget of bytes. For any number of threads.

    Keyed by content, so a name that moves to another version never yields the old weights. Threads
    that want one adapter at once load it once; loads of different adapters run side by side.
    """

    def __init__(
        self, load: Callable[[Any], PackedAdapter], *, limit_bytes: int = 512 * 2**20
    ) -> None:
        self._load = load
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        # By digest, the longest unused first. All below is touched under the lock only.
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._resident = self._size_bytes = 0
        self._hits = self._misses = self._evictions = self._failures = 0
        self._load_seconds = 0.0

    def __call__(self, entry: AdapterEntry) -> PackedAdapter:
        """Return the entry's adapter, loading it when it is not at hand.

        Raises:
            LorasegError: As the load does; nothing is kept of it, the next call tries again.
        """
        slot, adapter = self._pin(entry)
        self._release([slot])
        return adapter

    @contextmanager
    def hold(self, entries: Sequence[AdapterEntry]) -> Generator[list[PackedAdapter]]:
        """Give the adapters of entries and keep them in memory until the block ends.

        They count towards the budget. While adapters in use exceed it, the cache does too.

        Raises:
            AdapterUnavailableError: Some cannot be loaded; all were tried.
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
        """Return all figures, taken at one moment."""
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
        """Bytes of the adapters in memory."""
        return self.stats().size_bytes

    def __len__(self) -> int:
        return self.stats().resident

    def __contains__(self, digest: str) -> bool:
        """Tell whether an adapter is in memory, or on its way there."""
        with self._lock:
            return digest in self._slots

    def _pin(self, entry: AdapterEntry) -> tuple[_Slot, PackedAdapter]:
        """Return the entry's adapter and its slot, which stays until it is released."""
        while True:
            with self._lock:
                slot = self._slots.get(entry.digest)
                is_mine = slot is None
                if slot is None:
                    slot = self._slots[entry.digest] = _Slot(entry.digest)
                    self._misses += 1
                else:
                    self._slots.move_to_end(entry.digest)
                    self._hits += 1
                slot.pins += 1
            if is_mine:
                return slot, self._fill(slot, entry)
            slot.done.wait()
            if slot.adapter is not None:
                return slot, slot.adapter
            if isinstance(slot.error, Exception):
                raise slot.error
            # The loading thread was interrupted, which says nothing about the adapter.

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
        """Let the longest unused go. The newest stays, even if it is beyond the limit by itself."""
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
        AdapterUnavailableError: Some loads failed; all were tried.
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
