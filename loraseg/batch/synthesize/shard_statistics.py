"""Sums over the rows of a shard, stored beside it so that a report need not read the shards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraseg.data.shards.schema import PairRow

__all__ = ["ShardStatistics"]

_MAX_REJECTED = 200


@dataclass(slots=True)
class ShardStatistics:
    """Sums over rows.

    Attributes:
        pairs: Rows with an image.
        kept_sum: Sum of the shares of their labels that the filter kept.
        share_sums: By class, the sum of these shares over the pairs whose mask has the class.
        pair_counts: By class, the number of these pairs.
        rejected: (mask, status, reason) of rows that are not ``ok``, at most 200.
    """

    pairs: int = 0
    kept_sum: float = 0.0
    share_sums: list[float] = field(default_factory=list[float])
    pair_counts: list[int] = field(default_factory=list[int])
    rejected: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])

    @classmethod
    def from_rows(cls, rows: Iterable[PairRow], classes: int) -> "ShardStatistics":
        """Sum rows.

        Args:
            rows: Of a shard.
            classes: Number of classes.
        """
        sums = cls(share_sums=[0.0] * classes, pair_counts=[0] * classes)
        for row in rows:
            if row.status != "ok":
                name = row.mask_name if row.k is None else f"{row.mask_name}, image {row.k}"
                sums.rejected.append((name, row.status, row.reason or ""))
            if row.kept is None:
                continue
            sums.pairs += 1
            sums.kept_sum += row.kept
            for index, share in enumerate(row.kept_by_class):
                if share is not None:
                    sums.share_sums[index] += share
                    sums.pair_counts[index] += 1
        del sums.rejected[_MAX_REJECTED:]
        return sums

    @classmethod
    def merge(cls, shards: Iterable["ShardStatistics"], classes: int) -> "ShardStatistics":
        """Add the statistics of several shards in their order."""
        sums = cls(share_sums=[0.0] * classes, pair_counts=[0] * classes)
        for shard in shards:
            sums.pairs += shard.pairs
            sums.kept_sum += shard.kept_sum
            sums.share_sums = [
                a + b for a, b in zip(sums.share_sums, shard.share_sums, strict=True)
            ]
            sums.pair_counts = [
                a + b for a, b in zip(sums.pair_counts, shard.pair_counts, strict=True)
            ]
            sums.rejected += shard.rejected[: _MAX_REJECTED - len(sums.rejected)]
        return sums

    @property
    def mean_kept(self) -> float:
        """Mean over pairs of the share of labels that were kept; 0 without pairs."""
        return self.kept_sum / self.pairs if self.pairs else 0.0

    @property
    def kept_by_class(self) -> list[float | None]:
        """The same mean by class; None for a class that no mask has."""
        return [
            share / count if count else None
            for share, count in zip(self.share_sums, self.pair_counts, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "pairs": self.pairs,
            "kept": self.kept_sum,
            "shares": self.share_sums,
            "counts": self.pair_counts,
            "refused": [list(row) for row in self.rejected],
        }

    @classmethod
    def from_json(cls, values: Any, classes: int) -> "ShardStatistics":
        """Read what :meth:`to_json` returned.

        Raises:
            ValueError: A value is invalid.
            KeyError: A key is missing.
            TypeError: A value has another type.
        """
        shares: Sequence[float] = [float(share) for share in values["shares"]]
        counts: Sequence[int] = [int(count) for count in values["counts"]]
        if len(shares) != classes or len(counts) != classes:
            raise ValueError(f"{len(shares)} shares for {classes} classes")
        return cls(
            pairs=int(values["pairs"]),
            kept_sum=float(values["kept"]),
            share_sums=list(shares),
            pair_counts=list(counts),
            rejected=[
                (str(n), str(status), str(reason)) for n, status, reason in values["refused"]
            ],
        )
