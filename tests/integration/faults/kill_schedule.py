"""SIGKILL at chosen moments; Ray's workers import this by name."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraseg.seeding import numpy_generator
from loraseg.train.tasks import train_adapter_group
from tests.integration.process_kills import claim_once, find_target, log_and_kill, read_kill_log

_MAX_DELAY_S = 0.4  # long enough to meet checkpoints, scoring and publishing as well


@dataclass(frozen=True)
class ScheduledKill:
    """Kill ``delay_s`` after ``adapter`` reported ``step`` for the first time."""

    victim: Literal["worker", "driver", "node"]
    adapter: str
    step: int
    delay_s: float


@dataclass(frozen=True)
class KillSchedule:
    """Runs the tasks and strikes; each strike happens once, whoever takes over the adapter.

    ``folder`` remembers which have happened, and holds the driver's process number.
    """

    kills: tuple[ScheduledKill, ...]
    folder: Path

    def __call__(self, tasks, report):
        def report_and_strike(progress):
            report(progress)
            for number, strike in enumerate(self.kills):
                is_due = strike.adapter == progress.name and progress.step >= strike.step
                if is_due and claim_once(self.folder, number):
                    threading.Timer(strike.delay_s, self._kill, (strike,)).start()

        return train_adapter_group(tasks, report_and_strike)

    @property
    def driver_file(self):
        return self.folder / "driver"

    def log_lines(self):
        """Return a line for every strike that has happened."""
        return read_kill_log(self.folder)

    def kill_count(self):
        """Return how many died of it."""
        return sum(" killed " in line for line in self.log_lines())

    def _kill(self, strike):
        process = find_target(strike.victim, self.driver_file, "tests.integration.faults.driver")
        when = f"{strike.delay_s:.3f} s after step {strike.step} of {strike.adapter}"
        log_and_kill(process, strike.victim, when, self.folder)


def plan_kills(victim, adapters, steps, count, *seed):
    """Draw ``count`` strikes that no worker or driver can survive."""
    random = numpy_generator(seed[0], "strikes", victim, *seed[1:])
    return tuple(
        ScheduledKill(
            victim,
            adapters[int(random.integers(len(adapters)))],
            int(random.integers(1, steps + 1)),
            float(random.uniform(0, _MAX_DELAY_S)),
        )
        for _ in range(count)
    )
