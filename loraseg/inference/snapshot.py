"""One generation of a library: the adapters that fit base and encoder, ready to choose from.

Command line, batch jobs, evaluation and endpoint all build their libraries here, so that the same
library gives the same adapters everywhere.
"""

import fnmatch
import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraseg.adapters.packed import PackedAdapter
from loraseg.errors import StageError
from loraseg.inference.adapter_cache import AdapterPool
from loraseg.inference.adapter_ref import AdapterRef
from loraseg.inference.config import AttentionLoraSetting
from loraseg.inference.selection import AttentionLoraState
from loraseg.library.retrieve import AdapterRetriever
from loraseg.library.snapshot import CatalogEntry
from loraseg.lru_cache import LruCache

__all__ = ["AdapterFilter", "LibrarySnapshot", "build_snapshot", "describe_incompatible"]

logger = logging.getLogger(__name__)

_MAX_CACHED_PATTERNS = 256
_MAX_NAMES_SHOWN = 10
_DIGEST_CHARS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFilter:
    """Which adapters of a library can be used.

    Attributes:
        base_digest: sha256 (hex) of the frozen base.
        encoder_id: Of the index encoder.
        attention: Whether LoRA pairs of the CLIP attention act. ``as_trained`` takes the state that
            most adapters of a generation were trained with, ``active`` for a tie, and leaves the
            others out.
    """

    base_digest: str
    encoder_id: str
    attention: AttentionLoraSetting = "as_trained"

    def is_for_base(self, entry: CatalogEntry) -> bool:
        """Return whether an entry is an adapter of this base, even if unusable with the encoder."""
        return entry.card.role == "segmenter" and entry.card.base.digest == self.base_digest


@dataclass(frozen=True, kw_only=True, slots=True)
class LibrarySnapshot:
    """The adapters of one generation that fit; immutable.

    Attributes:
        generation: Of the catalog; 0 for an empty library.
        pool: References (:class:`AdapterRef`) to the adapters. Its ``load`` raises: weights are
            loaded where they are used.
        entries: Their catalog entries by name, ordered by name.
        attention: Whether LoRA pairs of the CLIP attention act.
        incompatible: Reason, by name, for every current adapter that was left out.
        loaded_at: ``time.time()``.
    """

    generation: int
    pool: AdapterPool
    entries: Mapping[str, CatalogEntry]
    attention: AttentionLoraState
    incompatible: Mapping[str, str]
    loaded_at: float = field(default_factory=time.time)
    _invisible_cache: LruCache[tuple[str, ...], frozenset[str]] = field(
        default_factory=lambda: LruCache(_MAX_CACHED_PATTERNS), repr=False, compare=False
    )

    def invisible(self, visible: tuple[str, ...] | None) -> frozenset[str]:
        """Return the names that match none of the patterns (``fnmatch``, case-sensitive)."""
        if visible is None:
            return frozenset()
        return self._invisible_cache.get_or_create(
            visible, lambda: _unmatched(self.entries, visible)
        )


def _unmatched(names: Iterable[str], patterns: Sequence[str]) -> frozenset[str]:
    matches = [re.compile(fnmatch.translate(pattern)).match for pattern in patterns]
    return frozenset(name for name in names if not any(match(name) for match in matches))


def build_snapshot(
    name: str, generation: int, published: Sequence[CatalogEntry], adapter_filter: AdapterFilter
) -> LibrarySnapshot:
    """Select the adapters that fit and index them; about a second for 10,000 new adapters.

    An adapter that does not fit is left out, reported by name in a log line, and never hides the
    others. Left out are adapters of other roles and bases, those without a centroid of this
    encoder, those whose centroids differ from the most frequent size and normalisation, and with
    ``as_trained`` those whose CLIP attention state is not that of the majority.

    Args:
        name: Name or URI of the library, for messages.
        generation: Of ``published``.
        published: Current entries, ordered by name.
        adapter_filter: What fits.
    """
    incompatible = {
        entry.name: _base_mismatch(entry, adapter_filter)
        for entry in published
        if not adapter_filter.is_for_base(entry)
    }
    fitting = [entry for entry in published if entry.name not in incompatible]
    # Adapters of other roles and bases are no candidates: they alone cause no warning.
    others = len(incompatible)
    incompatible |= _centroid_mismatches(fitting, adapter_filter.encoder_id)
    fitting = [entry for entry in fitting if entry.name not in incompatible]
    attention = _attention_state(fitting, adapter_filter.attention)
    if adapter_filter.attention == "as_trained":
        reason = f"not trained with CLIP attention LoRA {attention}, as most adapters are"
        incompatible |= {e.name: reason for e in fitting if _trained_attention(e) != attention}
        fitting = [entry for entry in fitting if entry.name not in incompatible]
    if len(incompatible) > others:
        logger.warning(
            "library %r: left out %d of %d adapters: %s",
            name,
            len(incompatible),
            len(published),
            describe_incompatible(incompatible),
        )
    refs = tuple(AdapterRef.from_entry(name, entry) for entry in fitting)
    pool = AdapterPool(
        refs,
        _raise_no_weights,
        AdapterRetriever(fitting, encoder_id=adapter_filter.encoder_id) if fitting else None,
        f"no adapter of library {name!r} fits" if published else f"library {name!r} is empty",
    )
    return LibrarySnapshot(
        generation=generation,
        pool=pool,
        entries={entry.name: entry for entry in fitting},
        attention=attention,
        incompatible=incompatible,
    )


def describe_incompatible(incompatible: Mapping[str, str]) -> str:
    """Return the names of adapters grouped by the reason why they were left out."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in incompatible.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{_join(names)} ({reason})" for reason, names in by_reason.items())


def _join(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES_SHOWN
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _base_mismatch(entry: CatalogEntry, adapter_filter: AdapterFilter) -> str:
    if entry.card.role != "segmenter":
        return f"its role is {entry.card.role}"
    got, expected = entry.card.base.digest, adapter_filter.base_digest
    return f"trained on base {got[:_DIGEST_CHARS]}, expected {expected[:_DIGEST_CHARS]}"


def _centroid_mismatches(entries: Sequence[CatalogEntry], encoder_id: str) -> dict[str, str]:
    """Return the entries without centroids of this encoder, or not of the most frequent kind."""
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
    other_kind = "its centroids differ from most others in size or normalisation"
    return {
        name: other_kind if of_entry else f"no centroid of encoder {encoder_id!r}"
        for name, of_entry in kinds.items()
        if not of_entry or of_entry != usual
    }


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
