"""One part of a benchmark that has several."""

from dataclasses import dataclass

from tests.bench.harness import Times

__all__ = ["PartialResult"]


@dataclass(frozen=True, slots=True)
class PartialResult:
    """Ratios, checks, times by rival in seconds, and what else should be said."""

    ratios: dict[str, float]
    checks: dict[str, bool]
    times: Times
    setting: dict[str, object]
