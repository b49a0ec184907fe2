"""Results of one part of a benchmark."""

from dataclasses import dataclass

from tests.bench.harness import Times

__all__ = ["PartialResult"]


@dataclass(frozen=True, slots=True)
class PartialResult:
    """Ratios, checks, times by variant in seconds, and further values."""

    ratios: dict[str, float]
    checks: dict[str, bool]
    times: Times
    setting: dict[str, object]
