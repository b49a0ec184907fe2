"""Stages that kill in the middle of their work; Ray's workers import this by name."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraseg.batch.synthesize.filter_stage import FilterStage
from loraseg.batch.synthesize.generate_stage import GenerateStage
from tests.integration.process_kills import claim_once, find_target, log_and_kill, read_kill_log


@dataclass(frozen=True)
class KillDuringStage:
    """Makes stages that kill ``victim`` a moment after they began a part, once each.

    Attributes:
        stage: Which stage strikes.
        victim: Its own worker, its node's raylet, or the driver.
        calls: At which calls of a process it strikes.
        delay_s: How long after the call began.
        folder: Remembers the strikes, and holds the driver's process number.
        times: Strikes in all.
    """

    stage: Literal["draw", "vote"]
    victim: Literal["worker", "node", "driver"]
    calls: int
    delay_s: float
    folder: Path
    times: int = 1

    def __call__(self, pinned):
        return _KilledStage(
            GenerateStage(pinned) if self.stage == "draw" else FilterStage(pinned), self
        )

    @property
    def driver_file(self):
        return self.folder / "driver"

    def log_lines(self):
        """Return a line for every strike."""
        return read_kill_log(self.folder)

    def kill(self):
        process = find_target(self.victim, self.driver_file, "tests.integration.synthesis.driver")
        when = f"{self.delay_s:.3f} s after {self.stage}"
        log_and_kill(process, self.victim, when, self.folder)

    def claim_kill(self):
        return any(claim_once(self.folder, number) for number in range(self.times))


class _KilledStage:
    def __init__(self, stage, accident):
        self._stage, self._accident, self._calls = stage, accident, 0

    def __call__(self, item):
        self._calls += 1
        if self._calls % self._accident.calls == 0 and self._accident.claim_kill():
            threading.Timer(self._accident.delay_s, self._accident.kill).start()
        return self._stage(item)
