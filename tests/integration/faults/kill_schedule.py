"""SIGKILL at scheduled training steps; Ray's workers import this by name."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loraseg.seeding import numpy_generator
from loraseg.train.tasks import train_adapter_group
from tests.integration.process_kills import claim_once, find_target, log_and_kill, read_kill_log

_MAX_DELAY_S = 0.4  # long enough to hit checkpoints, scoring and publishing as well


@dataclass(frozen=True)
class ScheduledKill:
    """Kills the target ``delay_s`` after ``adapter`` first reports ``step``."""

    target: Literal["worker", "driver", "node"]
    adapter: str
    step: int
    delay_s: float


@dataclass(frozen=True)
class KillSchedule:
    """Trains adapters and executes each kill once, in whichever worker reaches its step.

    Attributes:
        kills: The planned kills.
        folder: Counts the kills of all workers, and holds the driver's process id.
    """

    kills: tuple[ScheduledKill, ...]
    folder: Path

    def __call__(self, tasks, report):
        def report_and_kill(progress):
            report(progress)
            for number, kill in enumerate(self.kills):
                is_due = kill.adapter == progress.name and progress.step >= kill.step
                if is_due and claim_once(self.folder, number):
                    threading.Timer(kill.delay_s, self._kill, (kill,)).start()

        return train_adapter_group(tasks, report_and_kill)

    @property
    def driver_file(self):
        return self.folder / "driver"

    def log_lines(self):
        """Return one line per kill."""
        return read_kill_log(self.folder)

    def kill_count(self):
        """Return the number of processes that were killed."""
        return sum(" killed " in line for line in self.log_lines())

    def _kill(self, kill):
        process = find_target(kill.target, self.driver_file, "tests.integration.faults.driver")
        when = f"{kill.delay_s:.3f} s after step {kill.step} of {kill.adapter}"
        log_and_kill(process, kill.target, when, self.folder)


def plan_kills(target, adapters, steps, count, *seed):
    """Draw ``count`` kills at random steps."""
    random = numpy_generator(seed[0], "strikes", target, *seed[1:])
    return tuple(
        ScheduledKill(
            target,
            adapters[int(random.integers(len(adapters)))],
            int(random.integers(1, steps + 1)),
            float(random.uniform(0, _MAX_DELAY_S)),
        )
        for _ in range(count)
    )
