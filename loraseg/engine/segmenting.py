"""The second stage: load the chosen adapters, fuse them, run images through the model."""

import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

from loraseg.engine.adapter_ref import AdapterRef, AdapterUnavailableError, Failure
from loraseg.engine.shelf import Attention
from loraseg.errors import LorasegError, ServiceError
from loraseg.segment.choice import Choice, TilingChoice
from loraseg.segment.large import needs_tiles
from loraseg.segment.pool import AdapterCache, EntryLike, UnusableAdaptersError
from loraseg.segment.runner import Job, Runner, Segmentation
from loraseg.tensor_types import ndarray

__all__ = ["Prepared", "SegmentStage", "Segmented", "Task", "score_bytes"]

_LOADERS = 16
# Scores of one image are held whole unless it is cut into tiles.
_MOST_SCORE_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One image and the adapters chosen for it.

    Attributes:
        image: RGB, uint8 (h, w, 3).
        classes: Distinct names; their order gives the ids of the label map.
        choice: Of references, as a :class:`~loraseg.engine.retrieval.RetrievalStage` picks them.
        attention: Whether adapters of the CLIP attention act; None if there are none.
        maps: Any of ``confidence`` and ``entropy``.
        tiling: Whether the image is cut into overlapping tiles; ``auto`` decides by its size.
        deadline: When the answer is worthless, as ``time.time()``.
    """

    image: ndarray
    classes: tuple[str, ...]
    choice: Choice
    attention: Attention | None = None
    maps: frozenset[str] = field(default_factory=frozenset[str])
    tiling: TilingChoice = "auto"
    deadline: float = float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Segmented:
    """The result of one task.

    Attributes:
        result: Label map, further maps and explanation.
        batch: How many images went through the model together.
        timing_ms: ``load`` of its adapters, and ``segment`` of the whole batch.
    """

    result: Segmentation
    batch: int
    timing_ms: Mapping[str, float]


@dataclass(eq=False, slots=True)
class Prepared:
    """A task whose adapters are in memory and stay there until :meth:`release`.

    Attributes:
        task: What it is.
        job: The same as the model needs it.
        runner: The model that it needs.
        is_tiled: Whether it is to be cut into tiles.
        load_ms: How long its adapters took.
    """

    task: Task
    job: Job
    runner: Runner
    is_tiled: bool
    load_ms: float
    _pins: ExitStack

    @property
    def group(self) -> tuple[Any, ...]:
        """What tasks must share to go through the model together."""
        return id(self.runner), self.task.classes

    def release(self) -> None:
        """Let go of the adapters; harmless when repeated."""
        self._pins.close()


class SegmentStage:
    """Loads, fuses and segments.

    Preparing may go on in any number of threads while one thread runs the model.
    """

    def __init__(self, runners: Callable[[Attention | None], Runner], cache: AdapterCache) -> None:
        """Use models and a cache of adapters.

        Args:
            runners: Gives the model for either kind of CLIP attention, any for None; called under
                a lock.
            cache: Loads :class:`~loraseg.engine.adapter_ref.AdapterRef`; the runners load from it.
        """
        self._runners, self.cache = runners, cache
        self._choosing = threading.Lock()
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="load")

    def runner(self, attention: Attention | None = None) -> Runner:
        """Return the model for one kind of CLIP attention, any for None."""
        with self._choosing:
            return self._runners(attention)

    def prepare(self, task: Task) -> Prepared:
        """Load, pin and fuse the adapters of a task. From any thread.

        Raises:
            AdapterUnavailableError: Some of its adapters cannot be loaded or do not fit; it names
                all of them.
            ServiceError: ``invalid``: too large to be done without tiles.
        """
        runner = self.runner(task.attention)
        height, width = task.image.shape[:2]
        is_tiled = task.tiling == "always" or (
            task.tiling == "auto" and needs_tiles(height, width, runner.predictor)
        )
        if not is_tiled and score_bytes(task) > _MOST_SCORE_BYTES:
            raise ServiceError(
                "invalid",
                f"an image of {width} x {height} pixels with {len(task.classes)} classes is too "
                "large to be done in one piece; allow tiling",
            )
        started = time.perf_counter()
        pins = ExitStack()
        try:
            self._pin([part.entry for part in task.choice.parts], pins)
            mix = runner.fuse(task.choice)
        except UnusableAdaptersError as error:
            pins.close()
            raise AdapterUnavailableError(_failures(error)) from error
        except BaseException:
            pins.close()
            raise
        job = Job(image=task.image, choice=task.choice, mix=mix, maps=task.maps)
        load_ms = (time.perf_counter() - started) * 1000
        return Prepared(task, job, runner, is_tiled, load_ms, pins)

    def run(
        self, prepared: Sequence[Prepared], classes: Sequence[str]
    ) -> list[Segmented | LorasegError]:
        """Segment tasks of one group, none of them tiled. One thread at a time.

        Returns:
            One for each, with its own error if it has one; none disturbs the others.
        """
        started = time.perf_counter()
        try:
            results = prepared[0].runner.run([each.job for each in prepared], classes)
        except LorasegError as error:
            if len(prepared) == 1:
                return [error]
            return [answer for each in prepared for answer in self.run([each], classes)]
        spent_ms = (time.perf_counter() - started) * 1000
        return [
            Segmented(
                result=result,
                batch=len(prepared),
                timing_ms={"load": each.load_ms, "segment": spent_ms},
            )
            for each, result in zip(prepared, results, strict=True)
        ]

    def run_tiled(self, prepared: Prepared) -> Generator[None, None, Segmented]:
        """Segment a task by tiles. One thread at a time.

        Yields after every batch of tiles, so that other images may pass; closing gives up.
        """
        spent = 0.0
        tiles = prepared.runner.run_tiled(prepared.job, prepared.task.classes)
        while True:
            started = time.perf_counter()
            try:
                next(tiles)
            except StopIteration as end:
                spent += time.perf_counter() - started
                timing = {"load": prepared.load_ms, "segment": spent * 1000}
                return Segmented(result=end.value, batch=1, timing_ms=timing)
            spent += time.perf_counter() - started
            yield

    def close(self) -> None:
        """End its threads."""
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _pin(self, entries: Collection[EntryLike], pins: ExitStack) -> None:
        """Hold the entries, those that have to be loaded side by side."""
        absent = [entry for entry in entries if entry.digest not in self.cache]
        hurry = self._loaders.map if len(absent) > 1 else map
        errors: list[Exception] = []
        # Waits for all of them, so that none stays pinned when another fails.
        for held in [*hurry(self._hold, absent), *map(self._hold, set(entries) - set(absent))]:
            if isinstance(held, Exception):
                errors.append(held)
            else:
                pins.push(held)
        unusable = [error for error in errors if isinstance(error, UnusableAdaptersError)]
        if unusable:
            raise UnusableAdaptersError([failure for one in unusable for failure in one.failures])
        if errors:
            raise errors[0]

    def _hold(self, entry: EntryLike) -> AbstractContextManager[Any] | Exception:
        held = self.cache.hold([entry])
        try:
            held.__enter__()
        except Exception as error:  # noqa: BLE001  raised by whoever collects the others
            return error
        return held


def score_bytes(task: Task) -> int:
    """Return the memory for all scores of an untiled image."""
    height, width = task.image.shape[:2]
    return 4 * len(task.classes) * height * width


def _failures(error: UnusableAdaptersError) -> tuple[Failure, ...]:
    refs = ((cast(AdapterRef, entry), reason) for entry, reason in error.failures)
    return tuple(Failure.of(ref, reason) for ref, reason in refs)
