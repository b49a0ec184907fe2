"""One generation of a library, ready to choose from."""

import fnmatch
import logging
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraseg.adapters.packed import PackedAdapter
from loraseg.errors import StageError
from loraseg.inference.adapter_cache import AdapterPool
from loraseg.inference.adapter_ref import AdapterRef
from loraseg.inference.loading import AttentionLoraSetting
from loraseg.inference.selection import AttentionLoraState
from loraseg.library.retrieve import AdapterRetriever
from loraseg.library.snapshot import CatalogEntry
from loraseg.tensor_types import ndarray

__all__ = ["AdapterFilter", "LibrarySnapshot", "build_snapshot"]

logger = logging.getLogger(__name__)

_MAX_CACHED_PATTERNS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFilter:
    """Which adapters a service can use.

    Attributes:
        base_digest: sha256 (hex) of the frozen base.
        encoder_id: Of the index encoder.
        attention: Whether adapters of the CLIP attention act (methods B.1). ``as_trained`` takes
            what most adapters of a generation were trained with, ``active`` if as many were with
            either, and leaves the others out.
    """

    base_digest: str
    encoder_id: str
    attention: AttentionLoraSetting = "as_trained"


@dataclass(frozen=True, kw_only=True, slots=True)
class LibrarySnapshot:
    """The adapters of one generation that fit; never changed, only replaced.

    Attributes:
        generation: Of the catalog; 0 for an empty library.
        pool: References only (:class:`AdapterRef`); weights are loaded where they are used.
        entries: What the catalog says of each, by name, in order.
        attention: Whether adapters of the CLIP attention act.
        incompatible: How many current adapters do not fit.
        loaded_at: ``time.time()``.
    """

    generation: int
    pool: AdapterPool
    entries: Mapping[str, CatalogEntry]
    attention: AttentionLoraState
    incompatible: int
    loaded_at: float = field(default_factory=time.time)
    _invisible_cache: dict[tuple[str, ...], frozenset[str]] = field(
        default_factory=dict[tuple[str, ...], frozenset[str]], repr=False, compare=False
    )

    def invisible(self, visible: tuple[str, ...] | None) -> frozenset[str]:
        """Return the names that match none of the patterns (``fnmatch``, case matters)."""
        if visible is None:
            return frozenset()
        found = self._invisible_cache.get(visible)
        if found is None:
            matches = [re.compile(fnmatch.translate(pattern)).match for pattern in visible]
            found = frozenset(n for n in self.entries if not any(match(n) for match in matches))
            if len(self._invisible_cache) >= _MAX_CACHED_PATTERNS:
                self._invisible_cache.clear()
            self._invisible_cache[visible] = found
        return found


def build_snapshot(
    name: str, generation: int, published: Sequence[CatalogEntry], adapter_filter: AdapterFilter
) -> LibrarySnapshot:
    """Sort out what fits and index it; takes about a second for 10,000 new adapters.

    One adapter that does not fit, whatever the reason, never keeps the others away.

    Args:
        name: The service's name for the library.
        generation: What ``published`` is of.
        published: Current entries, ordered by name.
        adapter_filter: What fits.
    """
    fitting = [entry for entry in published if _matches(entry, adapter_filter)]
    fitting = _with_comparable_centroids(fitting, adapter_filter.encoder_id)
    attention = _attention_state(fitting, adapter_filter.attention)
    if adapter_filter.attention == "as_trained":
        fitting = [entry for entry in fitting if _trained_attention(entry) == attention]
    misfits = len(published) - len(fitting)
    if misfits:
        logger.warning("library %r: %d of %d do not fit", name, misfits, len(published))
    refs = {entry.name: AdapterRef.from_entry(name, entry) for entry in fitting}
    pool = AdapterPool(
        tuple(refs.values()),
        _raise_no_weights,
        _RefRetriever(refs, AdapterRetriever(fitting, encoder_id=adapter_filter.encoder_id))
        if fitting
        else None,
        f"no adapter of library {name!r} fits" if published else f"library {name!r} is empty",
    )
    entries = {entry.name: entry for entry in fitting}
    return LibrarySnapshot(
        generation=generation, pool=pool, entries=entries, attention=attention, incompatible=misfits
    )


@dataclass(frozen=True, slots=True)
class _RetrievedRef:
    entry: AdapterRef
    distance: float
    weight: float


class _RefRetriever:
    """A retriever that answers with references, which are small enough to travel."""

    def __init__(self, refs: Mapping[str, AdapterRef], retriever: AdapterRetriever) -> None:
        self._refs, self._retriever = refs, retriever

    def retrieve_batch(
        self, embeddings: Any, k: int, temperature: float, exclude: Collection[str] = ()
    ) -> list[list[_RetrievedRef]]:
        found = self._retriever.retrieve_batch(embeddings, k, temperature, exclude)
        return [
            [
                _RetrievedRef(self._refs[near.entry.name], near.distance, near.weight)
                for near in nearest
            ]
            for nearest in found
        ]

    def distances(self, embeddings: Any) -> ndarray:
        return self._retriever.distances(embeddings)


def _matches(entry: CatalogEntry, adapter_filter: AdapterFilter) -> bool:
    card = entry.card
    return card.role == "segmenter" and card.base.digest == adapter_filter.base_digest


def _with_comparable_centroids(
    entries: Sequence[CatalogEntry], encoder_id: str
) -> list[CatalogEntry]:
    """Keep the entries with centroids of this encoder, all of the most frequent kind."""
    kinds = {
        entry.name: {
            (centroid.normalised, centroid.vector.size)
            for centroid in entry.card.centroids
            if centroid.encoder_id == encoder_id
        }
        for entry in entries
    }
    counts = Counter(kind for of_entry in kinds.values() for kind in of_entry)
    usual = {kind for kind, _ in counts.most_common(1)}
    return [entry for entry in entries if kinds[entry.name] and kinds[entry.name] == usual]


def _attention_state(
    entries: Sequence[CatalogEntry], setting: AttentionLoraSetting
) -> AttentionLoraState:
    if setting != "as_trained":
        return setting
    counts = Counter(_trained_attention(entry) for entry in entries)
    return "inert" if counts["inert"] > counts["active"] else "active"


def _trained_attention(entry: CatalogEntry) -> AttentionLoraState:
    """Published SemLA adapters say nothing; their pairs of the attention are zero."""
    return "inert" if entry.card.recipe.get("clip_attention_lora") == "inert" else "active"


def _raise_no_weights(entry: Any) -> PackedAdapter:
    raise StageError(f"adapter {entry.name!r}: weights are loaded by the segmenter")
