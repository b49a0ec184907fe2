"""What an evaluation found: summary figures, JSON and a table for the terminal."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loraseg.evaluate.leave_one_out import METHODS, Method, TargetScores
from loraseg.segment.metrics import hmean

__all__ = [
    "METHOD_LABELS",
    "PAPER_HMEANS",
    "EvaluationResults",
    "gap_closed",
    "hmeans",
    "results_table",
]

METHOD_LABELS: Mapping[Method, str] = {
    "zero_shot": "zero-shot",
    "uniform": "uniform",
    "semla": "SemLA",
    "late_uniform": "late uniform",
    "late_semla": "late SemLA",
    "oracle": "oracle",
}

# SemLA, h-mean of mIoU over its 20 domains (methods B.8); per-domain rows are in the same place.
PAPER_HMEANS: Mapping[Method, float] = {
    "zero_shot": 0.394,
    "uniform": 0.519,
    "semla": 0.542,
    "late_uniform": 0.493,
    "late_semla": 0.521,
    "oracle": 0.611,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResults:
    """Everything that goes into ``results.json``; equal inputs give equal bytes.

    Attributes:
        provenance: Resolved config, code revision, seed, digests of base, encoder and adapters.
        tuning: How K and tau were chosen: folds, grid and its scores; empty when they were given.
        targets: One entry a domain, in the order of the config.
        isolated: Domains without relatives, left out of the second h-mean.
    """

    provenance: dict[str, Any]
    tuning: dict[str, Any]
    targets: tuple[TargetScores, ...]
    isolated: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return h-means with and without the lonely domains and the share of the gap closed."""
        kept = [target for target in self.targets if target.name not in self.isolated]
        return {
            "hmean": hmeans(self.targets),
            "hmean_without_lonely": hmeans(kept),
            "gap_closed": gap_closed(self.targets),
            "gap_closed_without_lonely": gap_closed(kept),
            "semla_ahead_of_uniform": sum(
                target.methods["semla"].miou > target.methods["uniform"].miou
                for target in self.targets
            ),
            "paper_hmean": dict(PAPER_HMEANS),
        }

    def to_json(self) -> str:
        """Return the results as indented JSON with sorted keys; pictures are left out."""
        content = {
            **self.provenance,
            "tuning": self.tuning,
            "lonely": list(self.isolated),
            "summary": self.summary(),
            "targets": [_target_json(target) for target in self.targets],
        }
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def hmeans(targets: Iterable[TargetScores]) -> dict[Method, float]:
    """Return the harmonic mean of mIoU for every method, over the domains that have it."""
    listed = list(targets)
    means: dict[Method, float] = {}
    for method in METHODS:
        values = [target.methods[method].miou for target in listed if method in target.methods]
        if values:
            means[method] = float(hmean(values))
    return means


def gap_closed(targets: Iterable[TargetScores]) -> float | None:
    """Return (SemLA - zero-shot) / (oracle - zero-shot) of the h-means.

    Only domains with an oracle count. None if there are none, or if the oracle gains nothing.
    """
    means = hmeans(target for target in targets if "oracle" in target.methods)
    if not means or means["oracle"] <= means["zero_shot"]:
        return None
    return (means["semla"] - means["zero_shot"]) / (means["oracle"] - means["zero_shot"])


def results_table(results: EvaluationResults) -> str:
    """Return the leave-one-out table as aligned text, mIoU in per cent, the paper's row beneath."""
    methods: list[Method] = [
        m for m in METHODS if any(m in target.methods for target in results.targets)
    ]
    head = ["domain", *(METHOD_LABELS[method] for method in methods), "K", "tau", "nearest"]
    rows = [_row(target, methods) for target in results.targets]
    summary = results.summary()
    rows.append(["h-mean", *(_percent(summary["hmean"].get(m)) for m in methods), "", "", ""])
    if results.isolated:
        means = summary["hmean_without_lonely"]
        name = f"h-mean without {', '.join(results.isolated)}"
        rows.append([name, *(_percent(means.get(m)) for m in methods), "", "", ""])
    rows.append(
        ["paper, 20 domains", *(_percent(PAPER_HMEANS[m]) for m in methods), "5", "0.05", ""]
    )
    lines = align_columns([head, *rows])
    # A rule under the head and one above the means.
    rule = "-" * max(len(line) for line in lines)
    lines[1 + len(results.targets) : 1 + len(results.targets)] = [rule]
    lines.insert(1, rule)
    gap = summary["gap_closed"]
    share = "an undefined share" if gap is None else f"{100 * gap:.0f} %"
    lines.append(f"SemLA closes {share} of the gap from zero-shot to oracle (paper: 68 %)")
    return "\n".join(lines) + "\n"


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines: first and last column flush left, numbers flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(target: TargetScores, methods: Sequence[Method]) -> list[str]:
    scores = [target.methods[m].miou if m in target.methods else None for m in methods]
    nearest = max(target.weights, key=lambda name: target.weights[name])
    return [
        target.name,
        *(_percent(score) for score in scores),
        str(target.setting.k),
        f"{target.setting.temperature:g}",
        f"{nearest} {target.weights[nearest]:.2f}",
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _target_json(target: TargetScores) -> dict[str, Any]:
    return {
        "name": target.name,
        "family": target.family,
        "classes": list(target.classes),
        "images": target.images,
        "data_digest": target.data_digest,
        "setting": asdict(target.setting),
        "methods": {method: asdict(score) for method, score in target.methods.items()},
        "weights": target.weights,
        "distances": target.distances,
    }
