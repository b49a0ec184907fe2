"""Progress reports of a training run."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

__all__ = ["Phase", "Progress", "ProgressCallback", "ProgressReporter"]

Phase = Literal["encode", "train", "evaluate", "publish"]


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run.

    Attributes:
        name: Name of the adapter.
        step: Finished steps.
        steps: Number of steps.
        loss: Loss of the last step; nan outside training.
        images_per_s: Throughput; 0 outside training.
        phase: Part of the run.
    """

    name: str
    step: int
    steps: int
    loss: float
    images_per_s: float
    phase: Phase


ProgressCallback = Callable[[Progress], None]


class ProgressReporter:
    """Turns steps of the loop into progress, with the throughput of this process."""

    def __init__(self, name: str, steps: int, batch_size: int, callback: ProgressCallback) -> None:
        """Prepare to report.

        Args:
            name: Name of the adapter.
            steps: Number of steps.
            batch_size: Images per step.
            callback: Called with each report.
        """
        self._name, self._steps, self._batch_size = name, steps, batch_size
        self._callback = callback
        self._images_done = 0
        self._started = time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        """Report a finished training step."""
        self._images_done += self._batch_size
        throughput = self._images_done / max(time.monotonic() - self._started, 1e-9)
        self._callback(Progress(self._name, step, self._steps, loss, throughput, "train"))

    def set_phase(self, phase: Phase, step: int) -> None:
        """Report the start of a phase."""
        self._callback(Progress(self._name, step, self._steps, float("nan"), 0.0, phase))

    def restart_throughput(self) -> None:
        """Measure the throughput from now on."""
        self._images_done, self._started = 0, time.monotonic()
