"""Where a domain lies in an encoder's space: mean, count and spread of its image embeddings."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraseg.errors import AdapterMismatchError, IntegrityError, StageError
from loraseg.tensor_types import Float, ndarray

__all__ = ["MAX_DIMENSIONS", "Centroid"]

MAX_DIMENSIONS = 65_536
_MAX_ENCODER_ID = 512


@dataclass(frozen=True, slots=True, eq=False)
class Centroid:
    """The mean of a domain's image embeddings, c_i = 1/N_i sum_j e_j (SemLA).

    The mean is not scaled to unit length, which would change distances, and with them the sharpness
    of the mixing weights, by an order of magnitude.

    Attributes:
        encoder_id: Identifies encoder, weights and preprocessing of the embeddings.
        normalised: Whether each embedding was scaled to unit length before averaging.
        vector: (d,) float64, read-only.
        count: Number of embeddings; None if unknown.
        spread: Root mean square distance of the embeddings to the mean; None if unknown.
    """

    encoder_id: str
    normalised: bool
    vector: Float[ndarray, " d"]
    count: int | None
    spread: float | None

    def __post_init__(self) -> None:
        """Check every field and freeze the vector.

        Raises:
            IntegrityError: A field is out of range.
        """
        vector = np.array(self.vector, dtype=np.float64)
        if vector.ndim != 1 or not 0 < vector.size <= MAX_DIMENSIONS:
            raise IntegrityError(
                f"centroid: got shape {vector.shape}, expected (d,) with d up to {MAX_DIMENSIONS}"
            )
        if not np.isfinite(vector).all():
            raise IntegrityError("centroid: a component is not finite")
        if not 0 < len(self.encoder_id) <= _MAX_ENCODER_ID:
            raise IntegrityError(f"centroid: encoder id of {len(self.encoder_id)} characters")
        if self.count is not None and self.count < 1:
            raise IntegrityError(f"centroid: count {self.count}, expected at least 1")
        if self.spread is not None and not (math.isfinite(self.spread) and self.spread >= 0):
            raise IntegrityError(f"centroid: spread {self.spread}, expected a number from 0")
        vector.setflags(write=False)
        object.__setattr__(self, "vector", vector)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Centroid):
            return NotImplemented
        return self._key() == other._key() and np.array_equal(self.vector, other.vector)

    def __hash__(self) -> int:
        return hash((self._key(), self.vector.tobytes()))

    @classmethod
    def from_embeddings(
        cls, embeddings: Float[ndarray, "n d"], *, encoder_id: str, normalised: bool
    ) -> "Centroid":
        """Average embeddings in float64.

        Args:
            embeddings: One row an image, as the encoder gives them.
            encoder_id: Which encoder made them.
            normalised: Whether the rows have unit length.

        Raises:
            StageError: There is no row, or a value is not finite.
        """
        rows = np.asarray(embeddings, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[0] == 0 or not np.isfinite(rows).all():
            raise StageError(
                f"embeddings of shape {rows.shape}: expected (n, d), n >= 1, all values finite"
            )
        mean = rows.mean(axis=0)
        spread = math.sqrt(float(((rows - mean) ** 2).sum(axis=1).mean()))
        return cls(encoder_id, normalised, mean, rows.shape[0], spread)

    def merge(self, other: "Centroid") -> "Centroid":
        """Return the centroid of both sets of images together, as if made from all of them.

        Chan's parallel formula: with ``delta = m2 - m1``, the mean is ``m1 + delta n2/n`` and the
        sums of squared distances add up with ``|delta|^2 n1 n2 / n``.

        Raises:
            AdapterMismatchError: The encoders differ, or a count or spread is unknown.
        """
        if (self.encoder_id, self.normalised, self.vector.size) != (
            other.encoder_id,
            other.normalised,
            other.vector.size,
        ):
            raise AdapterMismatchError(
                f"centroids of {self.encoder_id!r} (normalised: {self.normalised}, "
                f"{self.vector.size}-d) and {other.encoder_id!r} (normalised: {other.normalised}, "
                f"{other.vector.size}-d) cannot be merged"
            )
        if None in (self.count, self.spread, other.count, other.spread):
            raise AdapterMismatchError("a centroid of unknown count or spread cannot be merged")
        ours, theirs = int(self.count or 0), int(other.count or 0)
        total = ours + theirs
        delta = other.vector - self.vector
        squares = (
            ours * float(self.spread or 0) ** 2
            + theirs * float(other.spread or 0) ** 2
            + float(delta @ delta) * ours * theirs / total
        )
        return Centroid(
            self.encoder_id,
            self.normalised,
            self.vector + delta * (theirs / total),
            total,
            math.sqrt(squares / total),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; numbers keep all their bits."""
        return {
            "encoder_id": self.encoder_id,
            "normalised": self.normalised,
            "vector": self.vector.tolist(),
            "count": self.count,
            "spread": self.spread,
        }

    @classmethod
    def from_file(cls, values: "CentroidFile") -> "Centroid":
        """Build a centroid from the values that a card holds.

        Raises:
            IntegrityError: A value is out of range.
        """
        return cls(
            values.encoder_id,
            values.normalised,
            np.array(values.vector, dtype=np.float64),
            values.count,
            values.spread,
        )

    def _key(self) -> tuple[str, bool, int | None, float | None]:
        return self.encoder_id, self.normalised, self.count, self.spread


@dataclass(frozen=True, kw_only=True, slots=True)
class CentroidFile:
    """The values of a centroid in ``card.json``."""

    encoder_id: str
    normalised: bool
    vector: list[float]
    count: int | None = None
    spread: float | None = None
