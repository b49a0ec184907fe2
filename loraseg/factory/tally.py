"""Sums over the rows of a part, kept beside its shard: a report need not read the shards again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraseg.data.shards import PairRow

__all__ = ["Tally"]

_MOST_REFUSED = 200


@dataclass(slots=True)
class Tally:
    """Sums over rows.

    Attributes:
        pairs: Rows with an image.
        kept: Sum of their kept shares.
        shares: By class, the sum of kept shares over the pairs whose mask has it.
        counts: By class, how many pairs that are.
        refused: (mask, status, reason) of rows that are not ``ok``, at most 200.
    """

    pairs: int = 0
    kept: float = 0.0
    shares: list[float] = field(default_factory=list[float])
    counts: list[int] = field(default_factory=list[int])
    refused: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])

    @classmethod
    def of(cls, rows: Iterable[PairRow], classes: int) -> "Tally":
        """Sum up rows."""
        found = cls(shares=[0.0] * classes, counts=[0] * classes)
        for row in rows:
            if row.status != "ok":
                name = row.mask_name if row.k is None else f"{row.mask_name}, image {row.k}"
                found.refused.append((name, row.status, row.reason or ""))
            if row.kept is None:
                continue
            found.pairs += 1
            found.kept += row.kept
            for index, share in enumerate(row.kept_by_class):
                if share is not None:
                    found.shares[index] += share
                    found.counts[index] += 1
        del found.refused[_MOST_REFUSED:]
        return found

    @classmethod
    def total(cls, parts: Iterable["Tally"], classes: int) -> "Tally":
        """Add up the tallies of parts, in their order."""
        found = cls(shares=[0.0] * classes, counts=[0] * classes)
        for part in parts:
            found.pairs += part.pairs
            found.kept += part.kept
            found.shares = [a + b for a, b in zip(found.shares, part.shares, strict=True)]
            found.counts = [a + b for a, b in zip(found.counts, part.counts, strict=True)]
            found.refused += part.refused[: _MOST_REFUSED - len(found.refused)]
        return found

    @property
    def mean_kept(self) -> float:
        """Mean share of the labels that were kept, over pairs; 0 without pairs."""
        return self.kept / self.pairs if self.pairs else 0.0

    @property
    def kept_by_class(self) -> list[float | None]:
        """The same by class; None for a class that no mask has."""
        return [
            share / count if count else None
            for share, count in zip(self.shares, self.counts, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "pairs": self.pairs,
            "kept": self.kept,
            "shares": self.shares,
            "counts": self.counts,
            "refused": [list(one) for one in self.refused],
        }

    @classmethod
    def from_json(cls, values: Any, classes: int) -> "Tally":
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
