"""Mean and spread of the summary figures over several seeds."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraseg.errors import ConfigError
from loraseg.evaluate.methods import METHODS, Method
from loraseg.reports.text_table import align_columns

__all__ = ["summarise_seeds"]


def summarise_seeds(paths: Sequence[str | Path]) -> str:
    """Return a table of the h-means of several ``results.json``: each run, mean, deviation, paper.

    The deviation is the sample standard deviation (n - 1); a single run has no such row.

    Raises:
        ConfigError: ``paths`` is empty, or a file is not the ``results.json`` of an evaluation.
    """
    if not paths:
        raise ConfigError("results: expected at least one results.json")
    summaries = [_read_summary(Path(path)) for path in paths]
    methods: list[Method] = [
        m for m in METHODS if all(m in summary["hmean"] for summary in summaries)
    ]
    columns = [[summary["hmean"][method] for summary in summaries] for method in methods]
    gaps = [summary["gap_closed"] for summary in summaries]
    closed = [gap for gap in gaps if gap is not None]
    head = ["run", *(METHODS[method].label for method in methods), "gap closed", ""]
    rows = [
        [str(path), *(f"{100 * column[i]:.1f}" for column in columns), _format_gap(gaps[i]), ""]
        for i, path in enumerate(paths)
    ]
    mean = statistics.mean
    rows.append(
        [
            "mean",
            *(f"{100 * mean(column):.1f}" for column in columns),
            _format_gap(mean(closed) if closed else None),
            "",
        ]
    )
    if len(paths) > 1:
        deviation = f"{100 * statistics.stdev(closed):.0f} %" if len(closed) > 1 else "-"
        spreads = (f"{100 * statistics.stdev(column):.1f}" for column in columns)
        rows.append(["standard deviation", *spreads, deviation, ""])
    rows.append(
        [
            "paper",
            *(f"{100 * METHODS[method].published_hmean:.1f}" for method in methods),
            "68 %",
            "",
        ]
    )
    return "\n".join(align_columns([head, *rows], right=range(1, len(head) - 1))) + "\n"


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())["summary"]
        complete = "semla" in summary["hmean"] and "gap_closed" in summary
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not the results.json of an evaluation") from error
    if not complete:
        raise ConfigError(f"{path}: not the results.json of an evaluation")
    return summary


def _format_gap(gap: float | None) -> str:
    return "-" if gap is None else f"{100 * gap:.0f} %"
