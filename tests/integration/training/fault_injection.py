"""Kills workers at a step that the test chooses; Ray's workers import this module by name."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from loraseg.train.tasks import train_adapter_group


@dataclass(frozen=True)
class KillAtStep:
    """Runs the tasks and kills its worker or node once, at ``step``.

    ``marker`` is a file that exists after the kill; ``only`` limits the kill to one adapter.
    """

    step: int
    marker: Path
    node: bool = False
    only: str | None = None

    def __call__(self, tasks, report):
        def report_or_kill(progress):
            report(progress)
            due = self.only in (None, progress.name) and not self.marker.exists()
            if due and progress.step >= self.step:
                self.marker.touch()
                self._kill()

        return train_adapter_group(tasks, report_or_kill)

    def _kill(self):
        if self.node:
            # A worker is a child of its node's raylet, whose death removes the node from the
            # cluster. The worker must not continue until it is killed as well.
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)


def fail_with_environment(tasks, report):
    """Raise an error with the secret key that the worker sees, reversed."""
    raise RuntimeError(
        f"{tasks[0].name} sees {os.environ.get('AWS_SECRET_ACCESS_KEY', 'nothing')[::-1]}"
    )
