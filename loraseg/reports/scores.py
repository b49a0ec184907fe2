"""Scores of methods by domain, with differences to a baseline and the best method in bold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loraseg.errors import ConfigError
from loraseg.reports.formatting import (
    ABSENT,
    format_difference,
    format_percent,
    is_defined,
    share_of,
)
from loraseg.reports.tables import check_length

__all__ = ["MethodRow", "ScoreTable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRow:
    """A method's scores, one for each domain of its table.

    Attributes:
        name: Name of the method, as printed.
        scores: mIoU in [0, 1] by domain; None where the method was not run.
        hmean: Harmonic mean over the domains, in [0, 1]; None where it is undefined.
        note: What the method does; may be empty.
        spreads: Standard deviation over seeds by domain, in [0, 1]; empty for a single seed.
        hmean_spread: Standard deviation of ``hmean`` over seeds.
        is_bound: True for an upper bound such as the oracle, which cannot be the best method.
    """

    name: str
    scores: tuple[float | None, ...]
    hmean: float | None
    note: str = ""
    spreads: tuple[float | None, ...] = ()
    hmean_spread: float | None = None
    is_bound: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreTable:
    """Methods by domains.

    Attributes:
        domains: Column headings.
        rows: The methods, in the order in which they are printed.
        baseline: Name of the row that differences are taken to; empty for none.

    Raises:
        ConfigError: The number of scores of a row is not the number of domains, or no row is named
            ``baseline``.
    """

    macro: ClassVar[str] = "score_table"
    domains: tuple[str, ...]
    rows: tuple[MethodRow, ...]
    baseline: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            check_length(f"score table, scores of {row.name!r}", row.scores, self.domains)
            if row.spreads:
                check_length(f"score table, spreads of {row.name!r}", row.spreads, self.domains)
        names = [row.name for row in self.rows]
        if self.baseline and self.baseline not in names:
            raise ConfigError(f"score table: baseline {self.baseline!r} not in {names}")

    def view(self) -> "_ScoreTableView":
        """Return the printed cells, the best method of every column marked."""
        hmeans = [row.hmean for row in self.rows]
        columns = [self._format_column(hmeans, [row.hmean_spread for row in self.rows])]
        for domain in range(len(self.domains)):
            scores = [row.scores[domain] for row in self.rows]
            spreads = [row.spreads[domain] if row.spreads else None for row in self.rows]
            columns.append(self._format_column(scores, spreads))
        largest = max(filter(is_defined, hmeans), default=0.0)
        return _ScoreTableView(
            table=self,
            rows=[
                _RowView(
                    method=row,
                    hmean=columns[0][index],
                    scores=[column[index] for column in columns[1:]],
                    bar=share_of(row.hmean, largest),
                )
                for index, row in enumerate(self.rows)
            ],
            has_bound=any(row.is_bound for row in self.rows),
            has_spread=any(cell.spread for column in columns for cell in column),
        )

    def _format_column(
        self, values: Sequence[float | None], spreads: Sequence[float | None]
    ) -> list["_ScoreCell"]:
        texts = [format_percent(value) for value in values]
        # Scores are compared as printed: methods that show the same figure are equally good.
        competing = [
            float(text)
            for text, row in zip(texts, self.rows, strict=True)
            if text != ABSENT and not row.is_bound
        ]
        names = [row.name for row in self.rows]
        base = values[names.index(self.baseline)] if self.baseline else None
        cells: list[_ScoreCell] = []
        for row, value, spread, text in zip(self.rows, values, spreads, texts, strict=True):
            is_base = row.name == self.baseline
            delta, sign = ("", "") if is_base else format_difference(value, base)
            is_best = text != ABSENT and not row.is_bound and float(text) == max(competing)
            cells.append(_ScoreCell(text, format_percent(spread, absent=""), delta, sign, is_best))
        return cells


@dataclass(frozen=True, slots=True)
class _ScoreCell:
    """A printed score: percent, spread, difference to the baseline and its direction."""

    text: str
    spread: str
    delta: str
    sign: str
    is_best: bool


@dataclass(frozen=True, slots=True)
class _RowView:
    method: MethodRow
    hmean: _ScoreCell
    scores: list[_ScoreCell]
    bar: float


@dataclass(frozen=True, slots=True)
class _ScoreTableView:
    table: ScoreTable
    rows: list[_RowView]
    has_bound: bool
    has_spread: bool
