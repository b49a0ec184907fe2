"""Sums over the rows of a part, kept beside its shard: a report need not read the shards again."""

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
        kept_sum: Sum of their kept shares.
        share_sums: By class, the sum of kept shares over the pairs whose mask has it.
        pair_counts: By class, how many pairs that are.
        rejected: (mask, status, reason) of rows that are not ``ok``, at most 200.
    """

    pairs: int = 0
    kept_sum: float = 0.0
    share_sums: list[float] = field(default_factory=list[float])
    pair_counts: list[int] = field(default_factory=list[int])
    rejected: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])

    @classmethod
    def from_rows(cls, rows: Iterable[PairRow], classes: int) -> "ShardStatistics":
        """Sum up rows."""
        found = cls(share_sums=[0.0] * classes, pair_counts=[0] * classes)
        for row in rows:
            if row.status != "ok":
                name = row.mask_name if row.k is None else f"{row.mask_name}, image {row.k}"
                found.rejected.append((name, row.status, row.reason or ""))
            if row.kept is None:
                continue
            found.pairs += 1
            found.kept_sum += row.kept
            for index, share in enumerate(row.kept_by_class):
                if share is not None:
                    found.share_sums[index] += share
                    found.pair_counts[index] += 1
        del found.rejected[_MAX_REJECTED:]
        return found

    @classmethod
    def merge(cls, parts: Iterable["ShardStatistics"], classes: int) -> "ShardStatistics":
        """Add up the tallies of parts, in their order."""
        found = cls(share_sums=[0.0] * classes, pair_counts=[0] * classes)
        for part in parts:
            found.pairs += part.pairs
            found.kept_sum += part.kept_sum
            found.share_sums = [
                a + b for a, b in zip(found.share_sums, part.share_sums, strict=True)
            ]
            found.pair_counts = [
                a + b for a, b in zip(found.pair_counts, part.pair_counts, strict=True)
            ]
            found.rejected += part.rejected[: _MAX_REJECTED - len(found.rejected)]
        return found

    @property
    def mean_kept(self) -> float:
        """Mean share of the labels that were kept, over pairs; 0 without pairs."""
        return self.kept_sum / self.pairs if self.pairs else 0.0

    @property
    def kept_by_class(self) -> list[float | None]:
        """The same by class; None for a class that no mask has."""
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
            "refused": [list(one) for one in self.rejected],
        }

    @classmethod
    def from_json(cls, values: Any, classes: int) -> "ShardStatistics":
        """Read what :meth:`to_json` returned.

        Raises:
            ValueError: It is something else.
            KeyError: The same.
            TypeError: The same.
        """
        shares: Sequence[float] = [float(one) for one in values["shares"]]
        counts: Sequence[int] = [int(one) for one in values["counts"]]
        if len(shares) != classes or len(counts) != classes:
            raise ValueError(f"{len(shares)} shares for {classes} classes")
        refused = [(str(name), str(status), str(why)) for name, status, why in values["refused"]]
        return cls(int(values["pairs"]), float(values["kept"]), list(shares), list(counts), refused)
