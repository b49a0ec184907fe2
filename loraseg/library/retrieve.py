"""Which adapters lie nearest to an image, and how much of each to mix (SemLA, methods B.4)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.fuse.weights import mixing_weights
from loraseg.library.centroid import Centroid
from loraseg.library.snapshot import Entry
from loraseg.tensor_types import Float, Int, ndarray

__all__ = ["Retrieved", "Retriever", "top_k"]

# Below this many numbers comparing with every row exactly is as fast as looking for candidates.
_EXACT_SIZE = 2**18


@dataclass(frozen=True, slots=True)
class Retrieved:
    """One retrieved adapter: Euclidean distance and mixing weight."""

    entry: Entry
    distance: float
    weight: float


class Retriever:
    """Finds the adapters nearest to an image embedding.

    An adapter with several centroids counts by the nearest of them.
    """

    def __init__(self, entries: Sequence[Entry], *, encoder_id: str | None = None) -> None:
        """Index the centroids of ``entries``.

        Args:
            entries: At most one version of an adapter; the order breaks ties.
            encoder_id: Use only centroids made by this encoder; None if all are by the same.

        Raises:
            AdapterMismatchError: An entry has no such centroid, or centroids differ in encoder,
                normalisation or dimensions, so that distances would not compare.
        """
        self._entries = tuple(entries)
        owners: list[int] = []
        centroids: list[Centroid] = []
        for index, entry in enumerate(self._entries):
            own = [c for c in entry.card.centroids if encoder_id in (None, c.encoder_id)]
            if not own:
                raise AdapterMismatchError(
                    f"adapter {entry.name!r} has no centroid"
                    + (f" of encoder {encoder_id!r}" if encoder_id else "")
                )
            centroids += own
            owners += [index] * len(own)
        _check_comparable(self._entries, owners, centroids)
        self._owners = np.array(owners, dtype=np.int64)
        self._matrix = np.array([c.vector for c in centroids], dtype=np.float64)
        self._one_each = len(owners) == len(self._entries)

    def retrieve(
        self,
        embedding: ndarray,
        k: int,
        temperature: float,
        exclude: Collection[str] = (),
    ) -> list[Retrieved]:
        """Return the ``k`` nearest adapters, nearest first, with weights that sum to one.

        Args:
            embedding: (d,) as the centroids' encoder gives it.
            k: How many; fewer come back when there are fewer.
            temperature: tau of :func:`loraseg.fuse.mixing_weights`.
            exclude: Names to leave out, such as the image's own domain.

        Returns:
            The adapters, empty when none is left.

        Raises:
            ConfigError: ``k`` is below 1 or the temperature not above 0.
            AdapterMismatchError: The embedding has other dimensions than the centroids.
            StageError: The embedding is not finite.
        """
        rows = self._rows_without(exclude)
        if rows.size == 0:
            return []
        matrix = self._matrix if rows.size == len(self._matrix) else self._matrix[rows]
        # With several centroids an adapter, the k nearest rows may be of fewer than k adapters.
        order, distances = top_k(embedding, matrix, k if self._one_each else rows.size)
        owners, first = np.unique(self._owners[rows[order]], return_index=True)
        chosen = np.lexsort((owners, distances[first]))[:k]
        nearest = distances[first][chosen]
        weights = mixing_weights(nearest, temperature)
        return [
            Retrieved(self._entries[owner], float(distance), float(weight))
            for owner, distance, weight in zip(owners[chosen], nearest, weights, strict=True)
        ]

    def _rows_without(self, exclude: Collection[str]) -> Int[ndarray, " r"]:
        if not exclude:
            return np.arange(len(self._owners))
        kept = np.array([entry.name not in exclude for entry in self._entries], dtype=bool)
        return np.flatnonzero(kept[self._owners]) if kept.size else np.arange(0)


def top_k(
    query: ndarray, centroids: ndarray, k: int
) -> tuple[Int[ndarray, " found"], Float[ndarray, " found"]]:
    """Find the nearest rows by Euclidean distance, exactly; ties go to the lower index.

    Large matrices are first narrowed down by ``|c|^2 - 2 c q``, one pass over the bytes, with a
    margin that covers its rounding; what remains is compared in float64.

    Args:
        query: (d,) floats.
        centroids: (n, d) floats, finite.
        k: How many.

    Returns:
        Indices (int64) and float64 distances, ascending, ``min(k, n)`` of each.

    Raises:
        ConfigError: ``k`` is below 1.
        AdapterMismatchError: The shapes do not go together.
        StageError: The query is not finite.
    """
    if k < 1:
        raise ConfigError(f"k: got {k}, expected at least 1")
    if query.ndim != 1 or centroids.ndim != 2 or query.shape[0] != centroids.shape[1]:
        raise AdapterMismatchError(
            f"embedding of shape {query.shape} against centroids of shape {centroids.shape}: "
            "expected (d,) and (n, d)"
        )
    exact_query = query.astype(np.float64)
    if not np.isfinite(exact_query).all():
        raise StageError("embedding: a component is not finite")
    candidates = _candidates(exact_query, centroids, k)
    distances = np.linalg.norm(centroids[candidates].astype(np.float64) - exact_query, axis=1)
    order = np.lexsort((candidates, distances))[:k]
    return candidates[order], distances[order]


def _candidates(
    query: Float[ndarray, " d"], centroids: Float[ndarray, "n d"], k: int
) -> Int[ndarray, " c"]:
    """Return row indices, ascending, among which the k nearest certainly are."""
    count = centroids.shape[0]
    if count <= k or centroids.size <= _EXACT_SIZE:
        return np.arange(count)
    squares = np.einsum("nd,nd->n", centroids, centroids)
    approximate = squares - 2 * (centroids @ query.astype(centroids.dtype))
    # Forward error of a dot product of d terms: at most about d eps |x| |y|.
    eps = float(np.finfo(centroids.dtype).eps)
    reach = float(np.sqrt(squares.max())) + float(np.linalg.norm(query))
    margin = 4 * (centroids.shape[1] + 4) * eps * reach**2
    limit = np.partition(approximate, k - 1)[k - 1] + margin
    return np.flatnonzero(approximate <= limit)


def _check_comparable(
    entries: Sequence[Entry], owners: Sequence[int], centroids: Sequence[Centroid]
) -> None:
    kinds: dict[tuple[str, bool, int], str] = {}
    for owner, centroid in zip(owners, centroids, strict=True):
        kind = (centroid.encoder_id, centroid.normalised, centroid.vector.size)
        kinds.setdefault(kind, entries[owner].name)
    if len(kinds) > 1:
        found = "; ".join(
            f"{encoder!r}, normalised: {normalised}, {size}-d (e.g. {name!r})"
            for (encoder, normalised, size), name in kinds.items()
        )
        raise AdapterMismatchError(f"centroids of different kinds cannot be compared: {found}")
