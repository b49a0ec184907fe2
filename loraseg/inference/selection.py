"""Select the adapters of images.

SemLA (arXiv 2503.21780) weights the K adapters nearest to an image by the distances of its
embedding; see :func:`loraseg.fuse.mixing_weights`.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loraseg.errors import AdapterNotFoundError, ConfigError, StageError
from loraseg.inference.adapter_cache import AdapterPool, AdapterRetriever
from loraseg.inference.adapter_ref import AdapterEntry, AdapterFailure
from loraseg.tensor_types import Float, ndarray

__all__ = [
    "PRESETS",
    "AdapterMode",
    "AdapterQuery",
    "AdapterSelection",
    "AdaptiveSettings",
    "AttentionLoraState",
    "SelectedAdapter",
    "TilingMode",
    "adapter_not_found_error",
    "default_adaptive_settings",
    "select_adapters",
]

# Unknown names that an error message lists.
_MAX_NAMES_SHOWN = 5

AdapterMode = Literal["fused", "uniform", "base"]
AttentionLoraState = Literal["active", "inert"]
TilingMode = Literal["auto", "never", "always"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveSettings:
    """How adapters are chosen for an image.

    Attributes:
        k: Number of nearest adapters that are fused (Top-K of SemLA).
        temperature: SemLA's tau; a good value depends on the encoder's scale of distances.
        mode: ``fused`` retrieves per image, ``uniform`` mixes all adapters with equal weights,
            ``base`` uses none.
    """

    k: int = 5
    temperature: float = 0.05
    mode: AdapterMode = "fused"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k: got {self.k}, expected at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature: got {self.temperature}, expected a finite number above 0"
            )


# tau depends on the scale of the encoder's distances d: the weights are a softmax of 1/(d tau).
PRESETS: Mapping[str, AdaptiveSettings] = {
    "semla": AdaptiveSettings(k=5, temperature=0.05),
    "miniature": AdaptiveSettings(k=2, temperature=0.04),
}


def default_adaptive_settings(
    encoder: str,
    *,
    k: int | None = None,
    temperature: float | None = None,
    mode: AdapterMode = "fused",
) -> AdaptiveSettings:
    """Return given settings, completed by the preset of an index encoder.

    Args:
        encoder: Name of the encoder; one without a preset gets SemLA's.
        k: None for the preset's.
        temperature: None for the preset's.
        mode: How adapters are chosen.

    Raises:
        ConfigError: K or the temperature is out of range.
    """
    preset = PRESETS.get(encoder, PRESETS["semla"])
    return AdaptiveSettings(
        k=preset.k if k is None else k,
        temperature=preset.temperature if temperature is None else temperature,
        mode=mode,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterQuery:
    """How to select the adapters of one image.

    Attributes:
        settings: K, temperature and mode.
        only: Names of adapters to use, regardless of distance and K; weighted by distance
            (``fused``) or equally (``uniform``). Empty for all adapters.
        exclude: Names that must not be used.
    """

    settings: AdaptiveSettings
    only: frozenset[str] = field(default_factory=frozenset[str])
    exclude: frozenset[str] = field(default_factory=frozenset[str])


@dataclass(frozen=True, slots=True)
class SelectedAdapter:
    """One selected adapter.

    Attributes:
        entry: The adapter.
        weight: Mixing weight in [0, 1].
        distance: Euclidean distance to the image's embedding; None if it was not computed.
    """

    entry: AdapterEntry
    weight: float
    distance: float | None


@dataclass(frozen=True, slots=True)
class AdapterSelection:
    """The adapters of one image, nearest first.

    Attributes:
        mode: The requested mode.
        adapters: Empty for the bare base.
        fallback: Why the bare base is used although adapters were requested, else None.
        generation: Of the catalog that they were chosen from; None if no catalog was read.
        attention: Whether adapters of the CLIP attention act; None if that makes no difference,
            as without adapters.
        skipped: Visible adapters of the library that are out of service.
        timing_ms: ``embed`` and ``retrieve``, of the whole batch.
    """

    mode: AdapterMode
    adapters: tuple[SelectedAdapter, ...] = ()
    fallback: str | None = None
    generation: int | None = None
    attention: AttentionLoraState | None = None
    skipped: tuple[AdapterFailure, ...] = ()
    timing_ms: Mapping[str, float] = field(default_factory=dict[str, float], compare=False)


def select_adapters(
    pool: AdapterPool, embeddings: Float[ndarray, "n d"] | None, queries: Sequence[AdapterQuery]
) -> list[AdapterSelection]:
    """Select the adapters of n images.

    Queries that agree in K, temperature and names share one search.

    Args:
        pool: The adapters to select from.
        embeddings: Of the images, by the encoder of the centroids; None if no query has mode
            ``fused``, or the pool is empty.
        queries: One for each image. Mode ``base`` ignores the names of a query.

    Returns:
        One for each query; adapters of mode ``uniform`` are in the order of the pool.

    Raises:
        AdapterNotFoundError: ``only`` of a query has names that the pool does not have.
        AdapterMismatchError: The embeddings have other dimensions than the centroids.
        StageError: The number of embeddings is not n, or an embedding is not finite.
    """
    selected: dict[int, tuple[SelectedAdapter, ...]] = {}
    fused: list[int] = []
    for index, query in enumerate(queries):
        if query.settings.mode == "base":
            continue
        _check_names(pool, query)
        if query.settings.mode == "uniform":
            selected[index] = _select_uniform(pool, query)
        else:
            fused.append(index)
    if fused and pool.retriever is not None:
        if embeddings is None or len(embeddings) != len(queries):
            got = "none" if embeddings is None else len(embeddings)
            raise StageError(
                f"embeddings: got {got}, expected one for each of {len(queries)} images"
            )
        selected |= _select_nearest(
            pool, pool.retriever, embeddings, {index: queries[index] for index in fused}
        )
    return [
        _to_selection(pool, query, selected.get(index, ())) for index, query in enumerate(queries)
    ]


def _select_nearest(
    pool: AdapterPool,
    retriever: AdapterRetriever,
    embeddings: Float[ndarray, "n d"],
    queries: Mapping[int, AdapterQuery],
) -> dict[int, tuple[SelectedAdapter, ...]]:
    """Select for queries by row of the embeddings, equal queries in one search."""
    searches: dict[tuple[int, float, frozenset[str]], list[int]] = {}
    for row, query in queries.items():
        k, exclude = query.settings.k, query.exclude
        if query.only:
            names = query.only - query.exclude
            k, exclude = max(1, len(names)), pool.names - names
        searches.setdefault((k, query.settings.temperature, exclude), []).append(row)
    selected: dict[int, tuple[SelectedAdapter, ...]] = {}
    for (k, temperature, exclude), rows in searches.items():
        retrieved = retriever.retrieve_batch(embeddings[rows], k, temperature, exclude=exclude)
        for row, nearest in zip(rows, retrieved, strict=True):
            selected[row] = tuple(
                SelectedAdapter(pool.by_name[n.entry.name], float(n.weight), float(n.distance))
                for n in nearest
            )
    return selected


def adapter_not_found_error(
    names: Collection[str], available: Collection[str]
) -> AdapterNotFoundError:
    """Return the error for ``names`` that are not among the ``available`` adapters.

    It suggests a similar name of ``available``, which therefore must not contain names that the
    client may not see.
    """
    unknown = sorted(names)
    close = difflib.get_close_matches(unknown[0], sorted(available), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    shown = ", ".join(repr(name) for name in unknown[:_MAX_NAMES_SHOWN])
    more = f" and {len(unknown) - _MAX_NAMES_SHOWN} more" if len(unknown) > _MAX_NAMES_SHOWN else ""
    return AdapterNotFoundError(f"no adapter {shown}{more} among {len(available)}{hint}")


def _check_names(pool: AdapterPool, query: AdapterQuery) -> None:
    if unknown := query.only - pool.names:
        raise adapter_not_found_error(unknown, pool.names - query.exclude)


def _select_uniform(pool: AdapterPool, query: AdapterQuery) -> tuple[SelectedAdapter, ...]:
    entries = [
        entry
        for entry in pool.entries
        if entry.name not in query.exclude and (not query.only or entry.name in query.only)
    ]
    return tuple(SelectedAdapter(entry, 1.0 / len(entries), None) for entry in entries)


def _to_selection(
    pool: AdapterPool, query: AdapterQuery, adapters: tuple[SelectedAdapter, ...]
) -> AdapterSelection:
    if adapters or query.settings.mode == "base":
        return AdapterSelection(query.settings.mode, adapters)
    reason = "every adapter was excluded" if pool.entries else pool.empty_reason
    return AdapterSelection(query.settings.mode, (), reason)
