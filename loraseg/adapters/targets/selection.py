"""Selection of the layers that get an adapter: from a layer report, or at random."""

from torch import nn

from loraseg.adapters.targets.layer_report import LayerReport
from loraseg.adapters.targets.unet import attention_projections
from loraseg.errors import ConfigError
from loraseg.seeding import numpy_generator

__all__ = ["bottom_k", "select_from_report", "select_random", "share_to_count"]


def share_to_count(share: float, layers: int) -> int:
    """Return k = max(1, round(share * layers)).

    CA-LoRA (arXiv 2503.22172) selects shares of 1 to 10 % of the layers, not of the parameters.

    Raises:
        ConfigError: The share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share of layers {share}, expected a number in (0, 1]")
    return max(1, round(share * layers))


def select_from_report(
    report: LayerReport,
    *,
    top: int | None = None,
    share: float | None = None,
    projections_only: bool = True,
) -> tuple[str, ...]:
    """Return the names of the layers with the highest scores, highest first, ties by name.

    Exactly one of ``top`` and ``share`` must be given.

    Args:
        report: Report on the model that gets the adapter.
        top: Number of layers.
        share: Share of the layers, see :func:`share_to_count`.
        projections_only: Whether to consider (and count) attention projections only.

    Raises:
        ConfigError: Both or none of ``top`` and ``share`` are given, the value is out of range,
            or the report has no projection.
    """
    ranked = report.projections() if projections_only else report
    if share is not None and top is None:
        return ranked.top(share_to_count(share, len(ranked.scores)))
    if top is not None and share is None:
        return ranked.top(top)
    raise ConfigError(f"selection: top {top} and share {share}; expected exactly one of them")


def bottom_k(report: LayerReport, k: int, *, projections_only: bool = True) -> tuple[str, ...]:
    """Return the names of the k layers with the lowest scores, lowest first, ties by name.

    Raises:
        ConfigError: k is not in [1, number of layers], or the report has no projection.
    """
    ranked = report.projections() if projections_only else report
    if not 1 <= k <= len(ranked.scores):
        raise ConfigError(f"selection: k = {k}, expected 1 to {len(ranked.scores)} layers")
    ascending = sorted(ranked.scores, key=lambda score: (score.score, score.name))
    return tuple(score.name for score in ascending[:k])


def select_random(unet: nn.Module, k: int, seed: int) -> tuple[str, ...]:
    """Return the names of k attention projections drawn without replacement, in model order.

    Raises:
        ConfigError: k is not in [1, number of projections].
        AdapterMismatchError: The model has no attention projection.
    """
    names = [projection.name for projection in attention_projections(unet)]
    if not 1 <= k <= len(names):
        raise ConfigError(f"selection: k = {k}, expected 1 to {len(names)} projections")
    generator = numpy_generator(seed, "random-selection")
    chosen = generator.choice(len(names), size=k, replace=False)
    return tuple(names[index] for index in sorted(int(index) for index in chosen))
