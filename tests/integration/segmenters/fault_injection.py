"""A training that kills one of its workers; Ray's workers import this by name."""

import dataclasses
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from loraseg.train.closed_set.loop import train_segmenter


@dataclass(frozen=True)
class KillAfterCheckpoint:
    """Kills one worker once, after the checkpoint of a step, and records which workers resume.

    Attributes:
        rank: The worker.
        step: The step.
        folder: Holds the records as empty files.
    """

    rank: int
    step: int
    folder: Path

    def __call__(self, recipe, data, seed, context):
        (self.folder / f"world-{context.world_size}-{context.device}").touch()

        def load_checkpoint():
            checkpoint = context.load_checkpoint()
            if checkpoint is not None:
                (self.folder / f"resumed-{context.rank}").touch()
            return checkpoint

        def save_checkpoint(step, scores, state):
            context.save_checkpoint(step, scores, state)
            marker = self.folder / "killed"
            if (context.rank, step) == (self.rank, self.step) and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        changed = dataclasses.replace(
            context, load_checkpoint=load_checkpoint, save_checkpoint=save_checkpoint
        )
        return train_segmenter(recipe, data, seed, changed)
