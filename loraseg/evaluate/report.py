"""Render a report as one HTML file that needs neither network nor script.

This module turns values into what is printed (rounding, differences, who is best); the markup is in
``templates/``. Everything is escaped by the template engine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

from loraseg.evaluate.report_data import (
    HeatmapTable,
    HtmlReport,
    MethodRow,
    ReportExample,
    ScoreTable,
    WeightMatrix,
)
from loraseg.evaluate.report_pictures import RenderedExample, render_example
from loraseg.reports.templates import html_template

__all__ = ["render_report"]

_TEMPLATES = Path(__file__).parent / "templates"
_ABSENT = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
# Above this shade the ink for full shades has the better contrast; with the style sheet's colours
# no figure then falls below 4.5 : 1, on light and dark pages (a test computes it).
_HEAT_INK_THRESHOLD = 0.76


def render_report(report: HtmlReport) -> str:
    """Return the page as HTML text; the same report gives the same bytes.

    Args:
        report: What to show.

    Raises:
        DatasetError: A label map of an example holds ids outside its label space, or has another
            size than the image.
    """
    tables = (report.scores, *report.more_scores)
    return html_template(_TEMPLATES, "report.html.j2").render(
        report=report,
        tables=[_format_table(table) for table in tables],
        matrix=report.weights and _layout_matrix(report.weights),
        heat_tables=[_format_heatmap(table) for table in report.heat_tables],
        examples=_render_examples(report.examples),
        settings=_flatten(report.settings),
    )


@dataclass(frozen=True, slots=True)
class _ScoreCell:
    """A printed score: percent, spread, difference to the baseline and its sign."""

    text: str
    spread: str
    delta: str
    sign: str
    is_best: bool


@dataclass(frozen=True, slots=True)
class _Row:
    method: MethodRow
    hmean: _ScoreCell
    scores: tuple[_ScoreCell, ...]
    bar: float


@dataclass(frozen=True, slots=True)
class _Table:
    table: ScoreTable
    rows: tuple[_Row, ...]
    has_bound: bool
    has_spread: bool


@dataclass(frozen=True, slots=True)
class _HeatCell:
    """A shaded cell: text, share of the full shade in [0, 1], which colour, and which ink."""

    text: str
    share: float
    is_negative: bool
    on_heat: bool


def _format_table(table: ScoreTable) -> _Table:
    """Print every column, the h-mean's first, and find its best methods."""
    columns = [
        _format_column(
            table, [row.hmean for row in table.rows], [r.hmean_spread for r in table.rows]
        )
    ]
    for place in range(len(table.domains)):
        scores = [row.scores[place] for row in table.rows]
        spreads = [row.spreads[place] if row.spreads else None for row in table.rows]
        columns.append(_format_column(table, scores, spreads))
    longest = max((row.hmean for row in table.rows if _defined(row.hmean)), default=0.0)
    rows = tuple(
        _Row(
            method=row,
            hmean=columns[0][index],
            scores=tuple(column[index] for column in columns[1:]),
            bar=_share(row.hmean, longest),
        )
        for index, row in enumerate(table.rows)
    )
    return _Table(
        table=table,
        rows=rows,
        has_bound=any(row.is_bound for row in table.rows),
        has_spread=any(score.spread for row in rows for score in (row.hmean, *row.scores)),
    )


def _format_column(
    table: ScoreTable, values: Sequence[float | None], spreads: Sequence[float | None]
) -> list[_ScoreCell]:
    texts = [_percent(value) for value in values]
    # Compared as printed: what reads the same is equally good.
    competing = [
        float(text)
        for text, row in zip(texts, table.rows, strict=True)
        if text != _ABSENT and not row.is_bound
    ]
    names = [row.name for row in table.rows]
    base = values[names.index(table.baseline)] if table.baseline else None
    view: list[_ScoreCell] = []
    for row, value, spread, text in zip(table.rows, values, spreads, texts, strict=True):
        is_base = row.name == table.baseline
        delta, sign = ("", "") if is_base else _difference(value, base)
        is_best = text != _ABSENT and not row.is_bound and float(text) == max(competing)
        view.append(
            _ScoreCell(text, _percent(spread) if _defined(spread) else "", delta, sign, is_best)
        )
    return view


def _layout_matrix(matrix: WeightMatrix) -> dict[str, Any]:
    """Place the heat map: sizes in SVG units, which are pixels at full size."""
    heaviest = max((w for row in matrix.weights for w in row if _defined(w)), default=1.0) or 1.0
    longest_target = max((len(name) for name in matrix.targets), default=0)
    longest_adapter = max((len(name) for name in matrix.adapters), default=0)
    return {
        "matrix": matrix,
        "heaviest": heaviest,
        "left": 7 * longest_target + 18,
        "top": round(5.2 * longest_adapter) + 22,
        "right": round(5.2 * longest_adapter) + 8,
        "cell": 34,
        "cells": [
            [
                _HeatCell(
                    text=f"{weight:.2f}".removeprefix("0") if _defined(weight) else _ABSENT,
                    share=_share(weight, heaviest),
                    is_negative=False,
                    on_heat=_share(weight, heaviest) > _HEAT_INK_THRESHOLD,
                )
                for weight in row
            ]
            for row in matrix.weights
        ],
    }


def _format_heatmap(table: HeatmapTable) -> dict[str, Any]:
    sizes = [abs(value) for row in table.values for value in row if _defined(value)]
    # Differences are shaded against the largest one, shares against the whole.
    full = (max(sizes, default=1.0) or 1.0) if table.signed else 1.0
    cells: list[list[_HeatCell]] = []
    for row in table.values:
        line: list[_HeatCell] = []
        for value in row:
            share = _share(abs(value) if _defined(value) else None, full)
            text = _difference(value, 0.0)[0] if table.signed else _percent(value)
            negative = _defined(value) and value < 0
            line.append(_HeatCell(text or _ABSENT, share, negative, share > _HEAT_INK_THRESHOLD))
        cells.append(line)
    return {"table": table, "cells": cells}


def _render_examples(examples: Sequence[ReportExample]) -> list[RenderedExample]:
    return [render_example(example) for example in examples]


def _defined(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _percent(value: float | None) -> str:
    return f"{100 * value:.1f}" if _defined(value) else _ABSENT


def _difference(value: float | None, base: float | None) -> tuple[str, str]:
    """Return the difference in points as printed, and "up", "down" or "same"."""
    if not (_defined(value) and _defined(base)):
        return "", ""
    text = f"{100 * (value - base):+.1f}"
    if float(text) == 0:
        return "0.0", "same"
    return text.replace("-", _MINUS), "up" if value > base else "down"


def _share(value: float | None, full: float) -> float:
    if not _defined(value) or full <= 0:
        return 0.0
    return round(min(max(value / full, 0.0), 1.0), 4)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return dotted keys and printed values of nested mappings, in their own order."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += _flatten(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            lines.append(
                (f"{prefix}{key}", ", ".join(str(item) for item in cast(list[Any], value)))
            )
        else:
            lines.append((f"{prefix}{key}", str(value)))
    return lines
