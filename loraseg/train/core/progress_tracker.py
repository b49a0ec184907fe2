"""What every running adapter is doing, kept in one place and said in one line each.

Free of torch, so that the process that keeps the board stays small.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loraseg.train.core.progress import Progress

__all__ = ["ProgressTracker", "TaskProgress", "format_changes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskProgress:
    """The last word of one adapter.

    ``worker`` is the process at work, ``restarts`` counts those lost before it. ``remaining_s`` is
    the time that the rest of the training takes at its pace, None before there is a pace.
    """

    progress: Progress
    worker: str
    restarts: int
    remaining_s: float | None


@dataclass(slots=True)
class _WorkerStint:
    """One worker's stay with an adapter, and where its training began: (step, time)."""

    worker: str
    restarts: int
    first_report: tuple[int, float] | None = None


@dataclass(slots=True)
class ProgressTracker:
    """Takes the reports of many workers and answers where each adapter stands.

    Losing the board loses nothing but the display: the next reports fill it again.
    """

    clock: Callable[[], float] = time.monotonic
    _stints: dict[str, _WorkerStint] = field(default_factory=dict[str, _WorkerStint])
    _latest: dict[str, TaskProgress] = field(default_factory=dict[str, TaskProgress])

    def put(self, progress: Progress, worker: str) -> None:
        """Replace what is known of ``progress.name``; ``worker`` names the process that reports."""
        track = self._stints.get(progress.name)
        if track is None or track.worker != worker:
            track = _WorkerStint(worker, 0 if track is None else track.restarts + 1)
            self._stints[progress.name] = track
        self._latest[progress.name] = TaskProgress(
            progress=progress,
            worker=worker,
            restarts=track.restarts,
            remaining_s=self._remaining_s(progress, track),
        )

    def read(self) -> dict[str, TaskProgress]:
        """Return the standings by adapter name."""
        return dict(self._latest)

    def _remaining_s(self, progress: Progress, track: _WorkerStint) -> float | None:
        if progress.phase != "train":
            return None
        now = self.clock()
        if track.first_report is None:
            track.first_report = progress.step, now
        first_step, first_time = track.first_report
        if progress.step == first_step:
            return None
        step_s = (now - first_time) / (progress.step - first_step)
        return (progress.steps - progress.step) * step_s


def format_changes(
    before: Mapping[str, TaskProgress], now: Mapping[str, TaskProgress]
) -> list[str]:
    """Return one line for every adapter that went on between two readings of the board."""
    lines: list[str] = []
    for name, standing in now.items():
        earlier = before.get(name)
        if earlier is not None and earlier.restarts < standing.restarts:
            lines.append(f"{name}: its worker was lost, another took over")
        if earlier is None or _position(earlier) != _position(standing):
            lines.append(_format_line(standing))
    return lines


def _position(standing: TaskProgress) -> tuple[str, str, int]:
    # Not the whole progress: a loss that is nan differs from itself.
    return standing.worker, standing.progress.phase, standing.progress.step


def _format_line(standing: TaskProgress) -> str:
    progress = standing.progress
    words = [f"{progress.name}: {progress.phase} {progress.step}/{progress.steps}"]
    if progress.phase == "train":
        words.append(f"loss {progress.loss:.4f}")
        words.append(f"{progress.images_per_s:.1f} images/s")
    if standing.remaining_s is not None:
        words.append(f"{_format_duration(standing.remaining_s)} left")
    return "  ".join(words)


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
