"""Stages that kill processes while they run; Ray's workers import this by name."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraseg.batch.synthesize.run import STAGES
from tests.integration.process_kills import claim_once, find_target, log_and_kill, read_kill_log


@dataclass(frozen=True)
class KillDuringStage:
    """Builds steps that kill a process shortly after a call starts.

    Attributes:
        stage: Name of the stage.
        target: The stage's own worker, the raylet of its node, or the driver.
        calls: Every how many calls of a worker it kills.
        delay_s: Seconds between the start of the call and the kill.
        folder: Counts the kills of all workers, and holds the driver's process id.
        times: Number of kills by all workers together.
    """

    stage: Literal["generate", "filter"]
    target: Literal["worker", "node", "driver"]
    calls: int
    delay_s: float
    folder: Path
    times: int = 1

    def __call__(self, state):
        (stage,) = (stage for stage in STAGES if stage.name == self.stage)
        return _KilledStep(stage.make(state), self)

    @property
    def driver_file(self):
        return self.folder / "driver"

    def log_lines(self):
        """Return one line per kill."""
        return read_kill_log(self.folder)

    def kill(self):
        process = find_target(self.target, self.driver_file, "tests.integration.synthesis.driver")
        when = f"{self.delay_s:.3f} s after a call of {self.stage}"
        log_and_kill(process, self.target, when, self.folder)

    def claim_kill(self):
        return any(claim_once(self.folder, number) for number in range(self.times))


class _KilledStep:
    def __init__(self, step, fault):
        self._step, self._fault, self._calls = step, fault, 0

    def __call__(self, item):
        self._calls += 1
        if self._calls % self._fault.calls == 0 and self._fault.claim_kill():
            threading.Timer(self._fault.delay_s, self._fault.kill).start()
        return self._step(item)
