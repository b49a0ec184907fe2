"""What a running training says about itself."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

__all__ = ["Phase", "Progress", "ProgressCallback", "ProgressReporter"]

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


ProgressCallback = Callable[[Progress], None]


class ProgressReporter:
    """Turns the loop's steps into progress, with the throughput since this process took over."""

    def __init__(self, name: str, steps: int, batch_size: int, callback: ProgressCallback) -> None:
        """Report as ``name``, with ``steps`` in all of ``batch_size`` images each."""
        self._name, self._steps, self._batch_size = name, steps, batch_size
        self._callback = callback
        self._images_done = 0
        self._started = time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        """Report a finished training step."""
        self._images_done += self._batch_size
        pace = self._images_done / max(time.monotonic() - self._started, 1e-9)
        self._callback(Progress(self._name, step, self._steps, loss, pace, "train"))

    def set_phase(self, phase: Phase, step: int) -> None:
        """Report that another phase begins."""
        self._callback(Progress(self._name, step, self._steps, float("nan"), 0.0, phase))

    def restart_throughput(self) -> None:
        """Count the throughput from now on."""
        self._images_done, self._started = 0, time.monotonic()
