"""SIGKILL at chosen moments; Ray's workers import this by name."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraseg.seeding import numpy_generator
from loraseg.train.tasks import run_tasks
from tests.integration.victims import find_victim, is_first, kill, strike_lines

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
                if is_due and is_first(self.folder, number):
                    threading.Timer(strike.delay_s, self._strike, (strike,)).start()

        return run_tasks(tasks, report_and_strike)

    @property
    def driver_file(self):
        return self.folder / "driver"

    def happened(self):
        """Return a line for every strike that has happened."""
        return strike_lines(self.folder)

    def killed(self):
        """Return how many died of it."""
        return sum(" killed " in line for line in self.happened())

    def _strike(self, strike):
        process = find_victim(strike.victim, self.driver_file, "tests.integration.faults.driver")
        when = f"{strike.delay_s:.3f} s after step {strike.step} of {strike.adapter}"
        kill(process, strike.victim, when, self.folder)


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
