"""Stages that kill in the middle of their work; Ray's workers import this by name."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraseg.factory.draw import Draw
from loraseg.factory.work import Vote
from tests.integration.victims import find_victim, is_first, kill, strike_lines


@dataclass(frozen=True)
class Accident:
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
        return _Mortal(Draw(pinned) if self.stage == "draw" else Vote(pinned), self)

    @property
    def driver_file(self):
        return self.folder / "driver"

    def happened(self):
        """Return a line for every strike."""
        return strike_lines(self.folder)

    def strike(self):
        process = find_victim(self.victim, self.driver_file, "tests.integration.synthesis.driver")
        when = f"{self.delay_s:.3f} s after {self.stage}"
        kill(process, self.victim, when, self.folder)

    def is_first(self):
        return any(is_first(self.folder, number) for number in range(self.times))


class _Mortal:
    def __init__(self, stage, accident):
        self._stage, self._accident, self._calls = stage, accident, 0

    def __call__(self, item):
        self._calls += 1
        if self._calls % self._accident.calls == 0 and self._accident.is_first():
            threading.Timer(self._accident.delay_s, self._accident.strike).start()
        return self._stage(item)
