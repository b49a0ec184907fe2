"""Results of an evaluation: summary figures, JSON and a table for the terminal."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loraseg.evaluate.leave_one_out import TargetScores
from loraseg.evaluate.methods import METHODS, Method
from loraseg.reports.formatting import format_percent
from loraseg.reports.text_table import align_columns
from loraseg.segment.metrics import hmean

__all__ = [
    "EvaluationResults",
    "gap_closed",
    "hmeans",
    "results_table",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResults:
    """The content of ``results.json``; equal inputs give equal bytes.

    Attributes:
        provenance: Resolved config, code revision, seed, digests of base, encoder and adapters.
        tuning: Folds, grid and its scores; empty if K and tau are set by the config.
        targets: The scores of each domain, in the order of the config.
        isolated: Domains without related ones, left out of the second h-mean.
    """

    provenance: dict[str, Any]
    tuning: dict[str, Any]
    targets: tuple[TargetScores, ...]
    isolated: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Return h-means and the share of the gap closed, with and without isolated domains."""
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
            "paper_hmean": {name: method.published_hmean for name, method in METHODS.items()},
        }

    def to_json(self) -> str:
        """Return the results, without the pictures, as indented JSON with sorted keys."""
        content = {
            **self.provenance,
            "tuning": self.tuning,
            "lonely": list(self.isolated),
            "summary": self.summary(),
            "targets": [_target_json(target) for target in self.targets],
        }
        return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def hmeans(targets: Iterable[TargetScores]) -> dict[Method, float]:
    """Return the harmonic mean of each method's mIoU over the domains where it was scored."""
    listed = list(targets)
    means: dict[Method, float] = {}
    for method in METHODS:
        values = [target.methods[method].miou for target in listed if method in target.methods]
        if values:
            means[method] = float(hmean(values))
    return means


def gap_closed(targets: Iterable[TargetScores]) -> float | None:
    """Return (SemLA - zero-shot) / (oracle - zero-shot) of the h-means.

    Only domains with an oracle count. None if there are none, or if the oracle is not better than
    zero-shot.
    """
    means = hmeans(target for target in targets if "oracle" in target.methods)
    if not means or means["oracle"] <= means["zero_shot"]:
        return None
    return (means["semla"] - means["zero_shot"]) / (means["oracle"] - means["zero_shot"])


def results_table(results: EvaluationResults) -> str:
    """Return the table of mIoU in percent by domain and method, with the means and the paper's."""
    methods: list[Method] = [
        m for m in METHODS if any(m in target.methods for target in results.targets)
    ]
    head = ["domain", *(METHODS[method].label for method in methods), "K", "tau", "nearest"]
    rows = [_row(target, methods) for target in results.targets]
    summary = results.summary()
    rows.append(["h-mean", *(_percent(summary["hmean"].get(m)) for m in methods), "", "", ""])
    if results.isolated:
        means = summary["hmean_without_lonely"]
        name = f"h-mean without {', '.join(results.isolated)}"
        rows.append([name, *(_percent(means.get(m)) for m in methods), "", "", ""])
    rows.append(
        [
            "paper, 20 domains",
            *(_percent(METHODS[m].published_hmean) for m in methods),
            "5",
            "0.05",
            "",
        ]
    )
    lines = align_columns([head, *rows], right=range(1, len(head) - 1))
    # Rules below the header and above the means.
    rule = "-" * max(len(line) for line in lines)
    lines[1 + len(results.targets) : 1 + len(results.targets)] = [rule]
    lines.insert(1, rule)
    gap = summary["gap_closed"]
    share = "an undefined share" if gap is None else f"{100 * gap:.0f} %"
    lines.append(f"SemLA closes {share} of the gap from zero-shot to oracle (paper: 68 %)")
    return "\n".join(lines) + "\n"


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
    return format_percent(value, absent="-")


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
