"""Which adapters an image gets: what was asked for and what was found (methods B.4)."""

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

# Of a long list of unknown names, as many are told.
_MAX_NAMES_SHOWN = 5

AdapterMode = Literal["fused", "uniform", "base"]
AttentionLoraState = Literal["active", "inert"]
TilingMode = Literal["auto", "never", "always"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveSettings:
    """How adapters are chosen for an image.

    Attributes:
        k: Number of nearest adapters that are fused, K of methods B.4.
        temperature: tau of methods B.4; it belongs to the encoder's scale of distances.
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


# The same sharpness of 1/(d tau) needs another tau where distances have another scale.
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
    """What is asked for one image.

    Attributes:
        settings: K, temperature and mode.
        only: Names of adapters to use, all of them whatever their distance and K; they are
            weighted by distance (``fused``) or alike (``uniform``). Empty for no such demand.
        exclude: Names that must not be used.
    """

    settings: AdaptiveSettings
    only: frozenset[str] = field(default_factory=frozenset[str])
    exclude: frozenset[str] = field(default_factory=frozenset[str])


@dataclass(frozen=True, slots=True)
class SelectedAdapter:
    """One chosen adapter, its mixing weight and, if it was measured, its distance."""

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
    """Choose the adapters of n images.

    Wishes that agree in K, temperature and names are answered by one search.

    Args:
        pool: What there is to choose from.
        embeddings: Of the images, as the centroids' encoder gives them; None if no wish is of mode
            ``fused``, or the pool is empty.
        queries: One for each image. With mode ``base`` the names of a wish are not looked at.

    Returns:
        One for each wish; parts of ``uniform`` are in the order of the pool.

    Raises:
        AdapterNotFoundError: ``only`` of a wish has names that the pool does not have.
        AdapterMismatchError: The embeddings have other dimensions than the centroids.
        StageError: There is not one embedding an image, or one is not finite.
    """
    chosen: dict[int, tuple[SelectedAdapter, ...]] = {}
    measured: list[int] = []
    for index, wish in enumerate(queries):
        if wish.settings.mode == "base":
            continue
        _check_names(pool, wish)
        if wish.settings.mode == "uniform":
            chosen[index] = _select_uniform(pool, wish)
        else:
            measured.append(index)
    if measured and pool.retriever is not None:
        if embeddings is None or len(embeddings) != len(queries):
            got = "none" if embeddings is None else len(embeddings)
            raise StageError(
                f"embeddings: got {got}, expected one for each of {len(queries)} images"
            )
        chosen |= _select_nearest(
            pool, pool.retriever, embeddings, {i: queries[i] for i in measured}
        )
    return [_to_selection(pool, wish, chosen.get(index, ())) for index, wish in enumerate(queries)]


def _select_nearest(
    pool: AdapterPool,
    retriever: AdapterRetriever,
    embeddings: ndarray,
    queries: Mapping[int, AdapterQuery],
) -> dict[int, tuple[SelectedAdapter, ...]]:
    """Answer wishes by their row of the embeddings, equal ones together."""
    searches: dict[tuple[int, float, frozenset[str]], list[int]] = {}
    for row, wish in queries.items():
        k, exclude = wish.settings.k, wish.exclude
        if wish.only:
            left = wish.only - wish.exclude
            k, exclude = max(1, len(left)), pool.names - left
        searches.setdefault((k, wish.settings.temperature, exclude), []).append(row)
    chosen: dict[int, tuple[SelectedAdapter, ...]] = {}
    for (k, temperature, exclude), rows in searches.items():
        found = retriever.retrieve_batch(embeddings[rows], k, temperature, exclude=exclude)
        for row, near in zip(rows, found, strict=True):
            chosen[row] = tuple(
                SelectedAdapter(pool.by_name[n.entry.name], float(n.weight), float(n.distance))
                for n in near
            )
    return chosen


def adapter_not_found_error(
    names: Collection[str], available: Collection[str]
) -> AdapterNotFoundError:
    """Return the error that says that ``names`` are not ``available`` the adapters there are.

    Only names of ``available`` are proposed, so it must not hold any that the asker may not see.
    """
    unknown = sorted(names)
    close = difflib.get_close_matches(unknown[0], sorted(available), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    told = ", ".join(repr(name) for name in unknown[:_MAX_NAMES_SHOWN])
    more = f" and {len(unknown) - _MAX_NAMES_SHOWN} more" if len(unknown) > _MAX_NAMES_SHOWN else ""
    return AdapterNotFoundError(f"no adapter {told}{more} among {len(available)}{hint}")


def _check_names(pool: AdapterPool, query: AdapterQuery) -> None:
    if unknown := query.only - pool.names:
        raise adapter_not_found_error(unknown, pool.names - query.exclude)


def _select_uniform(pool: AdapterPool, query: AdapterQuery) -> tuple[SelectedAdapter, ...]:
    rest = [
        entry
        for entry in pool.entries
        if entry.name not in query.exclude and (not query.only or entry.name in query.only)
    ]
    return tuple(SelectedAdapter(entry, 1.0 / len(rest), None) for entry in rest)


def _to_selection(
    pool: AdapterPool, query: AdapterQuery, adapters: tuple[SelectedAdapter, ...]
) -> AdapterSelection:
    if adapters or query.settings.mode == "base":
        return AdapterSelection(query.settings.mode, adapters)
    reason = "every adapter was excluded" if pool.entries else pool.empty_reason
    return AdapterSelection(query.settings.mode, (), reason)
