"""The progress of all adapters of a training job, collected from their workers.

Imports no torch, to keep the process of the tracker small.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loraseg.train.core.progress import Progress

__all__ = ["ProgressTracker", "TaskProgress", "format_changes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskProgress:
    """The latest report of one adapter.

    Attributes:
        progress: The report.
        worker: The process that trains it.
        restarts: Number of workers that were lost before this one.
        remaining_s: Estimated time of the remaining steps in seconds; None before two steps.
    """

    progress: Progress
    worker: str
    restarts: int
    remaining_s: float | None


@dataclass(slots=True)
class _WorkerStint:
    """One worker's part of a training run, with its first training report: (step, time)."""

    worker: str
    restarts: int
    first_report: tuple[int, float] | None = None


@dataclass(slots=True)
class ProgressTracker:
    """Collects the reports of many workers.

    It holds nothing that training depends on: a restarted tracker fills up with the next reports.
    """

    clock: Callable[[], float] = time.monotonic
    _stints: dict[str, _WorkerStint] = field(default_factory=dict[str, _WorkerStint])
    _latest: dict[str, TaskProgress] = field(default_factory=dict[str, TaskProgress])

    def put(self, progress: Progress, worker: str) -> None:
        """Store a report of the process ``worker``."""
        stint = self._stints.get(progress.name)
        if stint is None or stint.worker != worker:
            stint = _WorkerStint(worker, 0 if stint is None else stint.restarts + 1)
            self._stints[progress.name] = stint
        self._latest[progress.name] = TaskProgress(
            progress=progress,
            worker=worker,
            restarts=stint.restarts,
            remaining_s=self._remaining_s(progress, stint),
        )

    def read(self) -> dict[str, TaskProgress]:
        """Return the latest report of each adapter, by name."""
        return dict(self._latest)

    def _remaining_s(self, progress: Progress, stint: _WorkerStint) -> float | None:
        if progress.phase != "train":
            return None
        now = self.clock()
        if stint.first_report is None:
            stint.first_report = progress.step, now
        first_step, first_time = stint.first_report
        if progress.step == first_step:
            return None
        step_s = (now - first_time) / (progress.step - first_step)
        return (progress.steps - progress.step) * step_s


def format_changes(
    before: Mapping[str, TaskProgress], now: Mapping[str, TaskProgress]
) -> list[str]:
    """Return one line per adapter whose progress changed between two readings."""
    lines: list[str] = []
    for name, current in now.items():
        earlier = before.get(name)
        if earlier is not None and earlier.restarts < current.restarts:
            lines.append(f"{name}: its worker was lost, another took over")
        if earlier is None or _position(earlier) != _position(current):
            lines.append(_format_line(current))
    return lines


def _position(current: TaskProgress) -> tuple[str, str, int]:
    # Without the loss: nan differs from itself.
    return current.worker, current.progress.phase, current.progress.step


def _format_line(current: TaskProgress) -> str:
    progress = current.progress
    words = [f"{progress.name}: {progress.phase} {progress.step}/{progress.steps}"]
    if progress.phase == "train":
        words.append(f"loss {progress.loss:.4f}")
        words.append(f"{progress.images_per_s:.1f} images/s")
    if current.remaining_s is not None:
        words.append(f"{_format_duration(current.remaining_s)} left")
    return "  ".join(words)


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
