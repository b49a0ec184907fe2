"""Ways for a worker to go, at a step that the test chooses; Ray's workers import this by name."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from loraseg.train.tasks import train_adapter_group


@dataclass(frozen=True)
class KillAtStep:
    """Runs the tasks and, the first time that ``step`` is reported, loses worker or node.

    ``marker`` is a file that remembers that it happened; ``only`` names the one adapter it befalls.
    """

    step: int
    marker: Path
    node: bool = False
    only: str | None = None

    def __call__(self, tasks, report):
        def report_or_die(progress):
            report(progress)
            unlucky = self.only in (None, progress.name) and not self.marker.exists()
            if unlucky and progress.step >= self.step:
                self.marker.touch()
                self._kill()

        return train_adapter_group(tasks, report_or_die)

    def _kill(self):
        if self.node:
            # A worker is a child of its node's raylet. Without it the node is lost to the cluster;
            # the worker must not get on with its work while it has not noticed yet.
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)


def fail_with_environment(tasks, report):
    """Fail with what the worker sees of the secret key, backwards."""
    raise RuntimeError(
        f"{tasks[0].name} sees {os.environ.get('AWS_SECRET_ACCESS_KEY', 'nothing')[::-1]}"
    )
