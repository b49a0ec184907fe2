"""The adapters that an adaptive segmenter chooses from.

The library is not imported here. What is needed of it comes in through these few protocols, so
that a store, a cache shared by a cluster or a list in a test can stand behind them.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from loraseg.adapters.packed import PackedAdapter
from loraseg.tensor_types import ndarray

__all__ = ["AdapterCache", "AdapterPool", "EntryLike", "Neighbour", "Retriever"]


@runtime_checkable
class EntryLike(Protocol):
    """What names one published adapter."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def version(self) -> int | str:
        """Which publication of the name."""
        ...

    @property
    def digest(self) -> str:
        """The sha256 of the weight files."""
        ...


@runtime_checkable
class Neighbour(Protocol):
    """One retrieved adapter."""

    @property
    def entry(self) -> EntryLike:
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
class Retriever(Protocol):
    """Finds the adapters nearest to image embeddings, nearest first, weights summing to one."""

    def retrieve_batch(
        self, embeddings: Any, k: int, temperature: float, exclude: Collection[str] = ()
    ) -> Sequence[Sequence[Neighbour]]:
        """Return at most k neighbours an embedding, none of the names in ``exclude``."""
        ...

    def distances(self, embeddings: Any) -> ndarray:
        """Return the distance of every embedding to every entry, (n, entries)."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterPool:
    """All adapters that fit one base.

    Attributes:
        entries: In catalog order.
        load: Gives the weights of an entry; usually an :class:`AdapterCache`.
        retriever: Over ``entries``; None when there are none.
        vacancy: Why ``entries`` is empty, for the explanation.
    """

    entries: Sequence[EntryLike]
    load: Callable[[Any], PackedAdapter]
    retriever: Retriever | None
    vacancy: str = "the library is empty"


class AdapterCache:
    """Keeps the most recently used adapters within a budget of bytes.

    Keyed by content, so a name that moves to another version never yields the old weights.
    """

    def __init__(
        self, load: Callable[[Any], PackedAdapter], *, limit_bytes: int = 512 * 2**20
    ) -> None:
        self._load = load
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[str, PackedAdapter] = OrderedDict()
        self.size_bytes = 0

    def __call__(self, entry: EntryLike) -> PackedAdapter:
        """Return the entry's adapter, loading it when it is not at hand."""
        if entry.digest not in self._kept:
            adapter = self._load(entry)
            self._kept[entry.digest] = adapter
            self.size_bytes += adapter.nbytes
        self._kept.move_to_end(entry.digest)
        # The newest always stays, even if it is larger than the budget by itself.
        while self.size_bytes > self._limit_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.nbytes
        return self._kept[entry.digest]

    def __len__(self) -> int:
        return len(self._kept)
