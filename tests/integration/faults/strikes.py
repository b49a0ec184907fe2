"""SIGKILL at chosen moments; Ray's workers import this by name."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from loraseg.seeding import numpy_generator
from loraseg.train.tasks import run_tasks

_LONGEST_DELAY_S = 0.4  # long enough to meet checkpoints, scoring and publishing as well


@dataclass(frozen=True)
class Strike:
    """Kill ``delay_s`` after ``adapter`` reported ``step`` for the first time."""

    victim: Literal["worker", "driver", "node"]
    adapter: str
    step: int
    delay_s: float


@dataclass(frozen=True)
class Ambush:
    """Runs the tasks and strikes; each strike happens once, whoever takes over the adapter.

    ``folder`` remembers which have happened, and holds the driver's process number.
    """

    strikes: tuple[Strike, ...]
    folder: Path

    def __call__(self, tasks, report):
        def report_and_strike(progress):
            report(progress)
            for number, strike in enumerate(self.strikes):
                is_due = strike.adapter == progress.name and progress.step >= strike.step
                if is_due and self._is_first(number):
                    threading.Timer(strike.delay_s, self._strike, (strike,)).start()

        return run_tasks(tasks, report_and_strike)

    @property
    def driver_file(self):
        return self.folder / "driver"

    def happened(self):
        """Return a line for every strike that has happened."""
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def killed(self):
        """Return how many died of it."""
        return sum(" killed " in line for line in self.happened())

    def _is_first(self, number):
        try:
            (self.folder / f"strike{number}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _strike(self, strike):
        process = self._find(strike.victim)
        deed = f"killed the {strike.victim} ({process.pid})" if process else "came too late"
        when = f"{strike.delay_s:.3f} s after step {strike.step} of {strike.adapter}"
        with (self.folder / "log").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {deed} {when}\n")
        if process:
            process.kill()

    def _find(self, victim):
        """Return the process, None if it is gone; its number may be another's by now."""
        if victim == "worker":
            return psutil.Process()
        number = os.getppid() if victim == "node" else int(self.driver_file.read_text())
        # A worker is a child of its node's raylet, without which the node is lost to the cluster.
        words = "raylet" if victim == "node" else "tests.integration.faults.driver"
        try:
            process = psutil.Process(number)
            return process if words in " ".join(process.cmdline()) else None
        except psutil.NoSuchProcess:
            return None


def plan_strikes(victim, adapters, steps, count, *seed):
    """Draw ``count`` strikes that no worker or driver can survive."""
    random = numpy_generator(seed[0], "strikes", victim, *seed[1:])
    return tuple(
        Strike(
            victim,
            adapters[int(random.integers(len(adapters)))],
            int(random.integers(1, steps + 1)),
            float(random.uniform(0, _LONGEST_DELAY_S)),
        )
        for _ in range(count)
    )
