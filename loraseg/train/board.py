"""What every running adapter is doing, kept in one place and said in one line each."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loraseg.train.tasks import Progress

__all__ = ["ProgressBoard", "Standing", "changes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """The last word of one adapter.

    ``worker`` names the process at work (``node:pid``), ``takeovers`` counts the workers that were
    lost before it, ``resumed_at`` is the first step that this worker reported and ``remaining_s``
    the seconds left at the pace it kept since then, None before there is a pace.
    """

    progress: Progress
    worker: str
    takeovers: int
    resumed_at: int
    remaining_s: float | None


@dataclass(slots=True)
class _Track:
    worker: str
    first_step: int
    first_time: float
    takeovers: int = 0


@dataclass(slots=True)
class ProgressBoard:
    """Takes the reports of many workers and answers where each adapter stands.

    Losing the board loses nothing but the display: the next reports fill it again.
    """

    clock: Callable[[], float] = time.monotonic
    _tracks: dict[str, _Track] = field(default_factory=dict[str, _Track])
    _standings: dict[str, Standing] = field(default_factory=dict[str, Standing])

    def put(self, progress: Progress, worker: str) -> None:
        """Replace what is known of ``progress.name``; ``worker`` is the process that reports."""
        now = self.clock()
        track = self._tracks.get(progress.name)
        if track is None or track.worker != worker:
            takeovers = 0 if track is None else track.takeovers + 1
            track = _Track(worker, progress.step, now, takeovers)
            self._tracks[progress.name] = track
        done, elapsed = progress.step - track.first_step, now - track.first_time
        pace = done / elapsed if done > 0 and elapsed > 0 else None
        self._standings[progress.name] = Standing(
            progress=progress,
            worker=worker,
            takeovers=track.takeovers,
            resumed_at=track.first_step,
            remaining_s=None if pace is None else (progress.steps - progress.step) / pace,
        )

    def read(self) -> dict[str, Standing]:
        """Return the standings by adapter name."""
        return dict(self._standings)


def changes(before: Mapping[str, Standing], now: Mapping[str, Standing]) -> list[str]:
    """Return one line for every adapter that went on between two readings of the board."""
    lines: list[str] = []
    for name, standing in now.items():
        earlier = before.get(name)
        if earlier is not None and earlier.takeovers < standing.takeovers:
            lines.append(f"{name}: its worker was lost; another goes on at step {standing.resumed_at}")
        if earlier is None or earlier.progress != standing.progress:
            lines.append(_line(standing))
    return lines


def _line(standing: Standing) -> str:
    progress = standing.progress
    words = [f"{progress.name}: {progress.phase} {progress.step}/{progress.steps}"]
    if progress.phase == "train":
        if progress.step:
            words.append(f"loss {progress.loss:.4f}  {progress.images_per_s:.1f} images/s")
        if standing.remaining_s is not None:
            words.append(f"{_duration(standing.remaining_s)} left")
    return "  ".join(words)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
