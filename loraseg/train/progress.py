"""What a running training says about itself."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

__all__ = ["Pace", "Phase", "Progress", "Report"]

Phase = Literal["encode", "train", "evaluate", "publish"]


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; ``loss`` is nan when there is none, ``step`` counts finished steps."""

    name: str
    step: int
    steps: int
    loss: float
    images_per_s: float
    phase: Phase


Report = Callable[[Progress], None]


class Pace:
    """Turns the loop's steps into progress, with the throughput since this process took over."""

    def __init__(self, name: str, steps: int, batch_size: int, report: Report) -> None:
        """Report as ``name``, with ``steps`` in all of ``batch_size`` images each."""
        self._name, self._steps, self._batch_size = name, steps, batch_size
        self._report = report
        self._seen = 0
        self._started = time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        """Report a finished training step."""
        self._seen += self._batch_size
        pace = self._seen / max(time.monotonic() - self._started, 1e-9)
        self._report(Progress(self._name, step, self._steps, loss, pace, "train"))

    def enter(self, phase: Phase, step: int) -> None:
        """Report that another phase begins."""
        self._report(Progress(self._name, step, self._steps, float("nan"), 0.0, phase))

    def restart(self) -> None:
        """Count the throughput from now on."""
        self._seen, self._started = 0, time.monotonic()
