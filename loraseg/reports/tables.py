"""Plain blocks of a report: notes, tables of text, bars."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from loraseg.errors import ConfigError
from loraseg.reports.formatting import share_of

__all__ = ["Bar", "BarChart", "Notes", "Table", "check_length"]


@dataclass(frozen=True, slots=True)
class Notes:
    """Sentences; more than one are printed as a list."""

    macro: ClassVar[str] = "notes"
    sentences: Sequence[str]

    def view(self) -> "Notes":
        """Return the block itself."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of text.

    Attributes:
        header: Column headings.
        rows: The cells of each row; the first cell names the row.
        numeric: Whether all columns but the first are aligned to the right.
        has_total: Whether the last row is set apart, as a sum or a mean.
    """

    macro: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True
    has_total: bool = False

    def view(self) -> "Table":
        """Return the block itself."""
        return self


@dataclass(frozen=True, slots=True)
class Bar:
    """A horizontal bar.

    Attributes:
        name: Label to its left.
        share: Length in [0, 1].
        text: Value to its right.
    """

    name: str
    share: float
    text: str


@dataclass(frozen=True, slots=True)
class BarChart:
    """Horizontal bars, one per row."""

    macro: ClassVar[str] = "bar_chart"
    bars: Sequence[Bar]

    def view(self) -> list[Bar]:
        """Return the bars with their lengths clipped to [0, 1]."""
        return [Bar(bar.name, share_of(bar.share, 1.0), bar.text) for bar in self.bars]


def check_length(where: str, values: Sequence[Any], names: Sequence[str]) -> None:
    """Check that there is one value per name.

    Raises:
        ConfigError: The lengths differ.
    """
    if len(values) != len(names):
        raise ConfigError(f"{where}: got {len(values)} values, expected {len(names)}")
