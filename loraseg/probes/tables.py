"""Layer reports as tables: what leads, which parts of the model lead, how far two reports agree."""

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
# What a layer is by a part of its name; the first that fits counts.
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
    """Layers that have something in common.

    Attributes:
        name: What they have in common.
        layers: Number of layers.
        mean: Of their scores.
        largest: Of their scores.
        leading: How many of them are among the report's first k.
    """

    name: str
    layers: int
    mean: float
    largest: float
    leading: int


@dataclass(frozen=True, slots=True)
class ReportAgreement:
    """How far two reports agree about the layers that both score.

    Attributes:
        layers: Number of these.
        left_out: Number of layers that only one of them scores.
        overlaps: (k, Jaccard overlap of the first k of each).
        spearman: Rank correlation in [-1, 1]; nan if a report scores all of them alike.
    """

    layers: int
    left_out: int
    overlaps: tuple[tuple[int, float], ...]
    spearman: float


def block_of(layer: LayerScore) -> str:
    """Return the UNet's block, or the first name of a layer that is in none."""
    found = _BLOCK.match(layer.name)
    return found[0] if found else layer.name.partition(".")[0]


def kind_of(layer: LayerScore) -> str:
    """Return what the layer does: ``cross q``, ``self out``, ``time``, ``conv``, ``norm``, ..."""
    if layer.part is not None:
        return f"{'cross' if layer.cross else 'self'} {layer.part}"
    return next((kind for pattern, kind in _KINDS if pattern.search(layer.name)), "other")


def resolution_of(layers: Iterable[LayerScore]) -> Callable[[LayerScore], str]:
    """Return a function that says at which resolution a layer works: ``1/4``, or ``-`` if unknown.

    That of a layer which is no projection is known if its block holds one. (The convolution at a
    block's end, which halves or doubles the sides, counts to the block.)

    Args:
        layers: All of the model's.
    """
    factors = {block_of(layer): layer.factor for layer in layers if layer.factor is not None}

    def resolution(layer: LayerScore) -> str:
        factor = factors.get(block_of(layer))
        return "-" if factor is None else f"1/{factor}"

    return resolution


def group_layers(
    report: LayerReport, name_of: Callable[[LayerScore], str], k: int
) -> list[LayerGroup]:
    """Sort the layers into groups, the highest mean score first, ties by name.

    Args:
        report: The layers.
        name_of: A layer's group.
        k: How many layers count as leading.

    Raises:
        ConfigError: k is not in [1, number of layers].
    """
    leading = set(report.top(k))
    members: dict[str, list[LayerScore]] = {}
    for layer in report.scores:
        members.setdefault(name_of(layer), []).append(layer)
    found = [
        LayerGroup(
            name=name,
            layers=len(layers),
            mean=math.fsum(layer.score for layer in layers) / len(layers),
            largest=max(layer.score for layer in layers),
            leading=sum(layer.name in leading for layer in layers),
        )
        for name, layers in members.items()
    ]
    return sorted(found, key=lambda group: (-group.mean, group.name))


def compare_reports(
    first: LayerReport, second: LayerReport, cuts: Sequence[int] = ()
) -> ReportAgreement:
    """Compare two reports on the layers that both score.

    Args:
        first: One report.
        second: The other; of any method.
        cuts: Sizes k of the heads that are compared; none for several that fit.

    Raises:
        ConfigError: They have no layer in common, or a k is not in [1, number of those].
    """
    names = [{layer.name for layer in report.scores} for report in (first, second)]
    common = names[0] & names[1]
    if not common:
        raise ConfigError(
            f"layer reports on {first.base_name!r} and {second.base_name!r} have no layer in "
            f"common; expected reports on one kind of model"
        )
    one, two = (
        replace(report, scores=tuple(s for s in report.scores if s.name in common))
        for report in (first, second)
    )
    chosen = tuple(cuts) or tuple(k for k in _TOP_K if k < len(common)) or (1,)
    scores = {layer.name: layer.score for layer in two.scores}
    return ReportAgreement(
        layers=len(common),
        left_out=len(names[0] ^ names[1]),
        overlaps=tuple((k, one.overlap(two, k)) for k in chosen),
        spearman=spearman(
            np.array([layer.score for layer in one.scores]),
            np.array([scores[layer.name] for layer in one.scores]),
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
    """Return what a report says, as text: its first k layers, then its groups.

    Raises:
        ConfigError: k is not positive; a k beyond the number of layers shows all.
    """
    k = min(k, len(report.scores))
    leading = report.top(k)
    resolution = resolution_of(report.scores)
    samples = ", ".join(f"{count} {name}" for name, count in sorted(report.samples.items()))
    rows = [
        (
            str(place),
            f"{layer.score:.3e}",
            kind_of(layer),
            resolution(layer),
            layer.name,
        )
        for place, layer in enumerate(report.scores[:k], start=1)
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
    """Return how far two reports agree, as text.

    Raises:
        ConfigError: As in :func:`agreement`.
    """
    found = compare_reports(first, second, cuts)
    only = f", {found.left_out} more in only one of them" if found.left_out else ""
    lines = [
        f"{report.method} probe of {report.base_name} ({report.base_digest[:12]})\n"
        for report in (first, second)
    ]
    rank = "undefined" if math.isnan(found.spearman) else f"{found.spearman:.3f}"
    rows = [(str(k), f"{overlap:.3f}") for k, overlap in found.overlaps]
    return (
        "".join(lines)
        + f"{found.layers} layers in both{only}; Spearman correlation {rank}\n\n"
        + format_table(("top", "Jaccard overlap"), rows)
    )


def _group_table(title: str, found: Sequence[LayerGroup], k: int) -> str:
    rows = [
        (
            group.name,
            str(group.layers),
            f"{group.mean:.3e}",
            f"{group.largest:.3e}",
            str(group.leading),
        )
        for group in found
    ]
    return format_table((title, "layers", "mean", "largest", f"in top {k}"), rows)
