"""A worker that kills itself in the middle of a part; Ray's workers import this by name."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from loraseg.batch.segment_images import stage
from loraseg.batch.segment_images.state import SegmentationRunState


@dataclass(frozen=True)
class KillBeforeWrite:
    """Makes workers that kill themselves before a write, ``times`` in all and once each.

    Every worker counts its own writes of masks; ``folder`` remembers the deaths.
    """

    before_write: int
    times: int
    folder: Path

    def __call__(self, pinned: SegmentationRunState):
        return _KilledStage(pinned, self)


class _KilledStage(stage.SegmentImagesStage):
    def __init__(self, pinned, accident):
        super().__init__(pinned)
        self._accident, self._writes = accident, 0

    def _write(self, item, result):
        self._writes += 1
        if self._writes == self._accident.before_write:
            for number in range(self._accident.times):
                try:
                    (self._accident.folder / f"death{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        return super()._write(item, result)
