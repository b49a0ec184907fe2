"""Shaded figures: tables of shares or differences, and the matrix of mixing weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loraseg.reports.formatting import (
    ABSENT,
    format_difference,
    format_percent,
    is_defined,
    share_of,
)
from loraseg.reports.tables import check_length

__all__ = ["HeatmapTable", "WeightMatrix"]

# Above this shade the inverse ink has the better contrast. With the colours of the style sheet the
# contrast then stays above 4.5 : 1 on light and dark pages (a test computes it).
_INK_THRESHOLD = 0.76
# Width of a character of rotated and of horizontal text, in SVG units.
_ROTATED_CHARACTER, _CHARACTER = 5.2, 7


@dataclass(frozen=True, slots=True)
class _HeatCell:
    """A shaded cell: text, shade in [0, 1], colour and ink."""

    text: str
    share: float
    is_negative: bool = False

    @property
    def on_heat(self) -> bool:
        """Whether the shade is so strong that the inverse ink is used."""
        return self.share > _INK_THRESHOLD


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatmapTable:
    """Shaded figures by row and column, such as the IoU of each class in each domain.

    Attributes:
        rows: Row headings.
        columns: Column headings.
        values: In [0, 1], or in [-1, 1] if ``signed``; None where undefined. Printed in percent.
        signed: True for differences: printed with a sign and shaded in two colours around 0.
        digits: Digits after the point of unsigned values.
        blank_below: Unsigned values below this are printed as empty cells.

    Raises:
        ConfigError: The shape of ``values`` is not rows x columns.
    """

    macro: ClassVar[str] = "heatmap_table"
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    signed: bool = False
    digits: int = 1
    blank_below: float = 0.0

    def __post_init__(self) -> None:
        check_length("heat map", self.values, self.rows)
        for name, row in zip(self.rows, self.values, strict=True):
            check_length(f"heat map, row {name!r}", row, self.columns)

    def view(self) -> tuple["HeatmapTable", list[list[_HeatCell]]]:
        """Return the table and its cells.

        Differences are shaded relative to the largest one, shares relative to 1.
        """
        largest = max((abs(v) for row in self.values for v in row if is_defined(v)), default=0.0)
        full = (largest or 1.0) if self.signed else 1.0
        return self, [[self._cell(value, full) for value in row] for row in self.values]

    def _cell(self, value: float | None, full: float) -> _HeatCell:
        share = share_of(None if value is None else abs(value), full)
        if self.signed:
            text = format_difference(value, 0.0)[0] or ABSENT
        elif is_defined(value) and value < self.blank_below:
            text = ""
        else:
            text = format_percent(value, digits=self.digits)
        return _HeatCell(text, share, is_defined(value) and value < 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightMatrix:
    """Mixing weights of adapters (columns) for domains (rows).

    Attributes:
        targets: Domains of the images, one per row.
        adapters: Names of the adapters, one per column.
        weights: Mean mixing weight over the images of a domain, in [0, 1]; None for an adapter that
            was left out (the domain's own).

    Raises:
        ConfigError: The shape of ``weights`` is not targets x adapters.
    """

    macro: ClassVar[str] = "weight_matrix"
    targets: Sequence[str]
    adapters: Sequence[str]
    weights: Sequence[Sequence[float | None]]

    def __post_init__(self) -> None:
        check_length("weight matrix", self.weights, self.targets)
        for target, row in zip(self.targets, self.weights, strict=True):
            check_length(f"weight matrix, row {target!r}", row, self.adapters)

    def view(self) -> "_WeightMatrixView":
        """Return the cells and the layout of the SVG picture.

        Cells are shaded relative to the largest weight. SVG units are pixels at full size.
        """
        largest = max((w for row in self.weights for w in row if is_defined(w)), default=1.0) or 1.0
        longest_target = max((len(name) for name in self.targets), default=0)
        longest_adapter = max((len(name) for name in self.adapters), default=0)
        rotated = round(_ROTATED_CHARACTER * longest_adapter)
        return _WeightMatrixView(
            matrix=self,
            cells=[[_weight_cell(weight, largest) for weight in row] for row in self.weights],
            left=_CHARACTER * longest_target + 18,
            top=rotated + 22,
            right=rotated + 8,
        )


@dataclass(frozen=True, slots=True)
class _WeightMatrixView:
    """A matrix with its cells and the margins of the picture, in SVG units."""

    matrix: WeightMatrix
    cells: list[list[_HeatCell]]
    left: int
    top: int
    right: int
    cell: int = 34


def _weight_cell(weight: float | None, largest: float) -> _HeatCell:
    text = f"{weight:.2f}".removeprefix("0") if is_defined(weight) else ABSENT
    return _HeatCell(text, share_of(weight, largest))
