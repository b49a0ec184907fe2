"""What every running adapter is doing, kept in one place and said in one line each.

Free of torch, so that the process that keeps the board stays small.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loraseg.train.progress import Progress

__all__ = ["ProgressBoard", "Standing", "changes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """The last word of one adapter.

    ``worker`` is the process at work, ``takeovers`` counts those lost before it. ``remaining_s`` is
    the time that the rest of the training takes at its pace, None before there is a pace.
    """

    progress: Progress
    worker: str
    takeovers: int
    remaining_s: float | None


@dataclass(slots=True)
class _Track:
    """One worker's stay with an adapter, and where its training began: (step, time)."""

    worker: str
    takeovers: int
    began: tuple[int, float] | None = None


@dataclass(slots=True)
class ProgressBoard:
    """Takes the reports of many workers and answers where each adapter stands.

    Losing the board loses nothing but the display: the next reports fill it again.
    """

    clock: Callable[[], float] = time.monotonic
    _tracks: dict[str, _Track] = field(default_factory=dict[str, _Track])
    _standings: dict[str, Standing] = field(default_factory=dict[str, Standing])

    def put(self, progress: Progress, worker: str) -> None:
        """Replace what is known of ``progress.name``; ``worker`` names the process that reports."""
        track = self._tracks.get(progress.name)
        if track is None or track.worker != worker:
            track = _Track(worker, 0 if track is None else track.takeovers + 1)
            self._tracks[progress.name] = track
        self._standings[progress.name] = Standing(
            progress=progress,
            worker=worker,
            takeovers=track.takeovers,
            remaining_s=self._remaining_s(progress, track),
        )

    def read(self) -> dict[str, Standing]:
        """Return the standings by adapter name."""
        return dict(self._standings)

    def _remaining_s(self, progress: Progress, track: _Track) -> float | None:
        if progress.phase != "train":
            return None
        now = self.clock()
        if track.began is None:
            track.began = progress.step, now
        first_step, first_time = track.began
        if progress.step == first_step:
            return None
        step_s = (now - first_time) / (progress.step - first_step)
        return (progress.steps - progress.step) * step_s


def changes(before: Mapping[str, Standing], now: Mapping[str, Standing]) -> list[str]:
    """Return one line for every adapter that went on between two readings of the board."""
    lines: list[str] = []
    for name, standing in now.items():
        earlier = before.get(name)
        if earlier is not None and earlier.takeovers < standing.takeovers:
            lines.append(f"{name}: its worker was lost, another took over")
        if earlier is None or _place(earlier) != _place(standing):
            lines.append(_line(standing))
    return lines


def _place(standing: Standing) -> tuple[str, str, int]:
    # Not the whole progress: a loss that is nan differs from itself.
    return standing.worker, standing.progress.phase, standing.progress.step


def _line(standing: Standing) -> str:
    progress = standing.progress
    words = [f"{progress.name}: {progress.phase} {progress.step}/{progress.steps}"]
    if progress.phase == "train":
        words.append(f"loss {progress.loss:.4f}")
        words.append(f"{progress.images_per_s:.1f} images/s")
    if standing.remaining_s is not None:
        words.append(f"{_duration(standing.remaining_s)} left")
    return "  ".join(words)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
