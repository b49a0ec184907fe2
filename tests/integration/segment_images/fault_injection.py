"""A stage whose worker kills itself before a write; Ray's workers import this by name."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from loraseg.batch.segment_images.stage import SegmentImagesStage
from tests.integration.process_kills import claim_once


@dataclass(frozen=True)
class KillBeforeWrite:
    """Builds steps that kill their worker before it writes a mask.

    Attributes:
        before_write: Which write of a worker, from 1.
        times: Number of kills by all workers together.
        folder: Counts the kills.
    """

    before_write: int
    times: int
    folder: Path

    def __call__(self, state):
        return _KilledStage(state, self)

    def count(self):
        return len(list(self.folder.glob("kill*")))


class _KilledStage(SegmentImagesStage):
    def __init__(self, state, fault):
        super().__init__(state)
        self._fault, self._writes = fault, 0

    def _write(self, item, result):
        self._writes += 1
        fault = self._fault
        if self._writes == fault.before_write and any(
            claim_once(fault.folder, number) for number in range(fault.times)
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._write(item, result)
