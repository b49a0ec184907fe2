"""Layer reports as text: leading layers, groups of layers, agreement of two reports."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from loraseg.adapters.targets.layer_report import LayerReport, LayerScore
from loraseg.errors import ConfigError
from loraseg.reports.text_table import format_table
from loraseg.tensor_types import Float, ndarray

__all__ = [
    "LayerGroup",
    "ReportAgreement",
    "block_of",
    "compare_reports",
    "format_comparison",
    "format_report",
    "group_layers",
    "kind_of",
    "resolution_of",
    "spearman",
]

_BLOCK = re.compile(r"(?:down_blocks|up_blocks)\.\d+|mid_block")
# Kind of a layer by its name; the first match counts.
_KINDS = (
    (re.compile(r"(^|\.)time_emb"), "time"),
    (re.compile(r"(^|\.)add_embedding\."), "size and pooled text"),
    (re.compile(r"norm"), "norm"),
    (re.compile(r"(^|\.)ff\."), "feed-forward"),
    (re.compile(r"(^|\.)proj_(in|out)$"), "in and out of attention"),
    (re.compile(r"(^|\.)conv"), "conv"),
)
_TOP_K = (5, 10, 20, 40, 80, 160)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with a common property, such as their block.

    Attributes:
        name: Value of the property.
        layers: Number of layers.
        mean: Mean score.
        largest: Largest score.
        leading: Number of layers among the first k of the report.
    """

    name: str
    layers: int
    mean: float
    largest: float
    leading: int


@dataclass(frozen=True, slots=True)
class ReportAgreement:
    """Agreement of two reports on the layers that both score.

    Attributes:
        layers: Number of layers that both score.
        left_out: Number of layers that only one of them scores.
        overlaps: (k, Jaccard overlap of the first k layers of each).
        spearman: Rank correlation in [-1, 1]; nan if all scores of a report are equal.
    """

    layers: int
    left_out: int
    overlaps: tuple[tuple[int, float], ...]
    spearman: float


def block_of(layer: LayerScore) -> str:
    """Return the UNet block of a layer, or the first part of its name if it is in no block."""
    match = _BLOCK.match(layer.name)
    return match[0] if match else layer.name.partition(".")[0]


def kind_of(layer: LayerScore) -> str:
    """Return the kind of a layer: ``cross q``, ``self out``, ``time``, ``conv``, ``norm``, ..."""
    if layer.part is not None:
        return f"{'cross' if layer.cross else 'self'} {layer.part}"
    return next((kind for pattern, kind in _KINDS if pattern.search(layer.name)), "other")


def resolution_of(layers: Iterable[LayerScore]) -> Callable[[LayerScore], str]:
    """Return a function that gives the resolution of a layer: ``1/4``, or ``-`` if unknown.

    A layer that is not a projection has the resolution of the projections in its block. The down-
    or upsampling convolution at the end of a block counts to the block.

    Args:
        layers: All layers of the model.
    """
    factors = {block_of(layer): layer.factor for layer in layers if layer.factor is not None}

    def resolution(layer: LayerScore) -> str:
        factor = factors.get(block_of(layer))
        return "-" if factor is None else f"1/{factor}"

    return resolution


def group_layers(
    report: LayerReport, name_of: Callable[[LayerScore], str], k: int
) -> list[LayerGroup]:
    """Return the layers in groups, by descending mean score, ties by name.

    Args:
        report: The layers.
        name_of: Returns the group of a layer.
        k: Number of layers that count as leading.

    Raises:
        ConfigError: k is not in [1, number of layers].
    """
    leading = set(report.top(k))
    members: dict[str, list[LayerScore]] = {}
    for layer in report.scores:
        members.setdefault(name_of(layer), []).append(layer)
    groups = [
        LayerGroup(
            name=name,
            layers=len(layers),
            mean=math.fsum(layer.score for layer in layers) / len(layers),
            largest=max(layer.score for layer in layers),
            leading=sum(layer.name in leading for layer in layers),
        )
        for name, layers in members.items()
    ]
    return sorted(groups, key=lambda group: (-group.mean, group.name))


def compare_reports(
    first: LayerReport, second: LayerReport, cuts: Sequence[int] = ()
) -> ReportAgreement:
    """Compare two reports on the layers that both score.

    Args:
        first: A report.
        second: Another report, of any method.
        cuts: Numbers k of leading layers that are compared; a default selection if empty.

    Raises:
        ConfigError: They have no layer in common, or a k is not in [1, number of those].
    """
    names = [{layer.name for layer in report.scores} for report in (first, second)]
    common = names[0] & names[1]
    if not common:
        raise ConfigError(
            f"layer reports on {first.base_name!r} and {second.base_name!r} have no layer in "
            f"common; expected reports on the same kind of model"
        )
    first, second = (
        replace(report, scores=tuple(s for s in report.scores if s.name in common))
        for report in (first, second)
    )
    cuts = tuple(cuts) or tuple(k for k in _TOP_K if k < len(common)) or (1,)
    scores = {layer.name: layer.score for layer in second.scores}
    return ReportAgreement(
        layers=len(common),
        left_out=len(names[0] ^ names[1]),
        overlaps=tuple((k, first.overlap(second, k)) for k in cuts),
        spearman=spearman(
            np.array([layer.score for layer in first.scores]),
            np.array([scores[layer.name] for layer in first.scores]),
        ),
    )


def spearman(first: Float[ndarray, " n"], second: Float[ndarray, " n"]) -> float:
    """Return Spearman's rank correlation in [-1, 1]; ties share their mean rank.

    The result is nan if one of the arrays is constant.
    """
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan  # scipy returns nan as well, but with a warning
    correlation: Any = spearmanr(first, second)
    return float(correlation.statistic)


def format_report(report: LayerReport, k: int = 10) -> str:
    """Return a report as text: its first k layers, then its groups.

    A k above the number of layers shows all of them.

    Raises:
        ConfigError: k is not positive.
    """
    k = min(k, len(report.scores))
    leading = report.top(k)
    resolution = resolution_of(report.scores)
    samples = ", ".join(f"{count} {name}" for name, count in sorted(report.samples.items()))
    rows = [
        (
            str(rank),
            f"{layer.score:.3e}",
            kind_of(layer),
            resolution(layer),
            layer.name,
        )
        for rank, layer in enumerate(report.scores[:k], start=1)
    ]
    parts = [
        f"{report.method} probe of {report.base_name} ({report.base_digest[:12]}): "
        f"{len(report.scores)} layers; {samples}\n",
        format_table(("", "score", "kind", "resolution", "layer"), rows),
    ]
    for title, name_of in (("block", block_of), ("resolution", resolution), ("kind", kind_of)):
        parts.append(_group_table(title, group_layers(report, name_of, k), len(leading)))
    return "\n".join(parts)


def format_comparison(first: LayerReport, second: LayerReport, cuts: Sequence[int] = ()) -> str:
    """Return the agreement of two reports as text.

    Raises:
        ConfigError: As in :func:`compare_reports`.
    """
    agreement = compare_reports(first, second, cuts)
    only = f", {agreement.left_out} more in only one of them" if agreement.left_out else ""
    lines = [
        f"{report.method} probe of {report.base_name} ({report.base_digest[:12]})\n"
        for report in (first, second)
    ]
    rank = "undefined" if math.isnan(agreement.spearman) else f"{agreement.spearman:.3f}"
    rows = [(str(k), f"{overlap:.3f}") for k, overlap in agreement.overlaps]
    return (
        "".join(lines)
        + f"{agreement.layers} layers in both{only}; Spearman correlation {rank}\n\n"
        + format_table(("top", "Jaccard overlap"), rows)
    )


def _group_table(title: str, groups: Sequence[LayerGroup], k: int) -> str:
    rows = [
        (
            group.name,
            str(group.layers),
            f"{group.mean:.3e}",
            f"{group.largest:.3e}",
            str(group.leading),
        )
        for group in groups
    ]
    return format_table((title, "layers", "mean", "largest", f"in top {k}"), rows)
