"""Stages that kill in the middle of their work; Ray's workers import this by name."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from loraseg.factory.work import Draw, Vote


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
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def strike(self):
        process = self._find()
        with (self.folder / "log").open("a") as log:
            deed = f"killed the {self.victim} ({process.pid})" if process else "came too late"
            log.write(
                f"{time.strftime('%H:%M:%S')} {deed}, {self.delay_s:.3f} s after {self.stage}\n"
            )
        if process:
            process.kill()

    def is_first(self):
        for number in range(self.times):
            try:
                (self.folder / f"strike{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            return True
        return False

    def _find(self):
        """Return the process, None if it is gone; its number may be another's by now."""
        if self.victim == "worker":
            return psutil.Process()
        number = os.getppid() if self.victim == "node" else int(self.driver_file.read_text())
        words = "raylet" if self.victim == "node" else "tests.integration.synthesis.driver"
        try:
            process = psutil.Process(number)
            return process if words in " ".join(process.cmdline()) else None
        except psutil.NoSuchProcess:
            return None


class _Mortal:
    def __init__(self, stage, accident):
        self._stage, self._accident, self._calls = stage, accident, 0

    def __call__(self, item):
        self._calls += 1
        if self._calls % self._accident.calls == 0 and self._accident.is_first():
            threading.Timer(self._accident.delay_s, self._accident.strike).start()
        return self._stage(item)
