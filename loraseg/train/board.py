"""What every running adapter is doing, kept in one place and said in one line each.

Free of torch, so that the process that keeps the board stays small.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["ProgressBoard", "Report", "Standing", "changes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The fields of :class:`loraseg.train.tasks.Progress`, and who sends them (``node:pid``)."""

    name: str
    step: int
    steps: int
    loss: float
    images_per_s: float
    phase: str
    worker: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """The last report of one adapter.

    ``takeovers`` counts the workers lost before the present one; ``remaining_s`` is the time that
    the rest of the training takes at the present worker's pace, None before there is a pace.
    """

    report: Report
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

    def put(self, report: Report) -> None:
        """Replace what is known of ``report.name``."""
        track = self._tracks.get(report.name)
        if track is None or track.worker != report.worker:
            track = _Track(report.worker, 0 if track is None else track.takeovers + 1)
            self._tracks[report.name] = track
        self._standings[report.name] = Standing(
            report=report, takeovers=track.takeovers, remaining_s=self._remaining_s(report, track)
        )

    def read(self) -> dict[str, Standing]:
        """Return the standings by adapter name."""
        return dict(self._standings)

    def _remaining_s(self, report: Report, track: _Track) -> float | None:
        if report.phase != "train":
            return None
        now = self.clock()
        if track.began is None:
            track.began = report.step, now
        first_step, first_time = track.began
        if report.step == first_step:
            return None
        return (report.steps - report.step) * (now - first_time) / (report.step - first_step)


def changes(before: Mapping[str, Standing], now: Mapping[str, Standing]) -> list[str]:
    """Return one line for every adapter that went on between two readings of the board."""
    lines: list[str] = []
    for name, standing in now.items():
        earlier = before.get(name)
        if earlier is not None and earlier.takeovers < standing.takeovers:
            lines.append(f"{name}: its worker was lost, another took over")
        if earlier is None or earlier.report != standing.report:
            lines.append(_line(standing))
    return lines


def _line(standing: Standing) -> str:
    report = standing.report
    words = [f"{report.name}: {report.phase} {report.step}/{report.steps}"]
    if report.phase == "train":
        words.append(f"loss {report.loss:.4f}")
        words.append(f"{report.images_per_s:.1f} images/s")
    if standing.remaining_s is not None:
        words.append(f"{_duration(standing.remaining_s)} left")
    return "  ".join(words)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
