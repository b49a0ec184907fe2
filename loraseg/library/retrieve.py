"""The adapters nearest to an image embedding, and their mixing weights exp(1 / (d tau)) (SemLA)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from loraseg.errors import AdapterMismatchError
from loraseg.fuse.weights import mixing_weights
from loraseg.library.centroid import Centroid
from loraseg.library.nearest import CentroidIndex
from loraseg.library.snapshot import CatalogEntry
from loraseg.tensor_types import Float, Int, ndarray

__all__ = ["AdapterRetriever", "RetrievedEntry"]


@dataclass(frozen=True, slots=True)
class RetrievedEntry:
    """One retrieved adapter: Euclidean distance and mixing weight."""

    entry: CatalogEntry
    distance: float
    weight: float


class AdapterRetriever:
    """Finds the adapters nearest to an image embedding.

    An adapter with several centroids counts by the nearest of them.
    """

    def __init__(self, entries: Sequence[CatalogEntry], *, encoder_id: str | None = None) -> None:
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
        # By entry, so that a lower row is of the same entry or an earlier one, also where rows tie.
        self._owners = np.array(owners, dtype=np.int64)
        self._firsts = np.flatnonzero(np.diff(self._owners, prepend=-1))
        self._counts = np.sort(np.bincount(self._owners))[::-1]
        self._rows_by_name: dict[str, list[int]] = {}
        for row, owner in enumerate(owners):
            self._rows_by_name.setdefault(self._entries[owner].name, []).append(row)
        vectors = np.array([c.vector for c in centroids], dtype=np.float64)
        self._index = CentroidIndex(vectors) if centroids else None

    def retrieve(
        self,
        embedding: ndarray,
        k: int,
        temperature: float,
        exclude: Collection[str] = (),
    ) -> list[RetrievedEntry]:
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
        return self.retrieve_batch(embedding[None], k, temperature, exclude)[0]

    def retrieve_batch(
        self,
        embeddings: ndarray,
        k: int,
        temperature: float,
        exclude: Collection[str] = (),
    ) -> list[list[RetrievedEntry]]:
        """Return :meth:`retrieve` of every embedding (q, d), in one pass over the centroids.

        Raises:
            ConfigError: As :meth:`retrieve`.
            AdapterMismatchError: As :meth:`retrieve`.
            StageError: As :meth:`retrieve`.
        """
        if self._index is None:
            return [[] for _ in embeddings]
        excluded = [row for name in exclude for row in self._rows_by_name.get(name, ())]
        rows, distances = self._index.search(
            embeddings, self._rows_needed(k), excluded=np.array(excluded, dtype=np.int64)
        )
        pairs = zip(self._owners[rows], distances, strict=True)
        return [self._with_weights(*_nearest_per_entry(*pair, k), temperature) for pair in pairs]

    def distances(self, embeddings: ndarray) -> Float[ndarray, "q entries"]:
        """Return the Euclidean distance of every embedding (q, d) to every adapter, in float64.

        The numbers are those of :meth:`retrieve`; columns are in the order of the entries.

        Raises:
            AdapterMismatchError: The embeddings have other dimensions than the centroids.
            StageError: An embedding is not finite.
        """
        distances = np.empty((len(embeddings), len(self._entries)), dtype=np.float64)
        if self._index is not None:
            for row, embedding in zip(distances, embeddings, strict=True):
                np.minimum.reduceat(self._index.distances(embedding), self._firsts, out=row)
        return distances

    def _rows_needed(self, k: int) -> int:
        """Return how many of the nearest rows are surely of ``k`` adapters."""
        # At worst the first rows are all those of the k - 1 adapters that have the most.
        return k if k < 1 else int(self._counts[: k - 1].sum()) + 1

    def _with_weights(
        self, owners: Int[ndarray, " c"], distances: Float[ndarray, " c"], temperature: float
    ) -> list[RetrievedEntry]:
        weights = mixing_weights(distances, temperature)
        return [
            RetrievedEntry(self._entries[owner], float(distance), float(weight))
            for owner, distance, weight in zip(owners, distances, weights, strict=True)
        ]


def _nearest_per_entry(
    owners: Int[ndarray, " r"], distances: Float[ndarray, " r"], k: int
) -> tuple[Int[ndarray, " c"], Float[ndarray, " c"]]:
    """Keep the nearest row of every owner, in the given ascending order, and k of those."""
    first = np.sort(np.unique(owners, return_index=True)[1])[:k]
    return owners[first], distances[first]


def _check_comparable(
    entries: Sequence[CatalogEntry], owners: Sequence[int], centroids: Sequence[Centroid]
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
