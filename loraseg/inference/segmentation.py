"""The second stage: load the chosen adapters, fuse them, run images through the model."""

import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

from loraseg.errors import LorasegError, ServiceError
from loraseg.inference.adapter_cache import AdapterCache, AdapterEntry, UnusableAdaptersError
from loraseg.inference.adapter_ref import AdapterFailure, AdapterRef, AdapterUnavailableError
from loraseg.inference.runner import Segmentation, SegmentJob, SegmentRunner
from loraseg.inference.selection import AdapterSelection, TilingMode
from loraseg.inference.snapshot import AttentionLoraState
from loraseg.segment.open_vocabulary.tiled_inference import needs_tiling
from loraseg.tensor_types import ndarray

__all__ = [
    "PreparedRequest",
    "SegmentationRequest",
    "SegmentationResult",
    "SegmentationStage",
    "score_bytes",
]

_LOAD_THREADS = 16
# Scores of one image are held whole unless it is cut into tiles.
_MAX_SCORE_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationRequest:
    """One image and the adapters chosen for it.

    Attributes:
        image: RGB, uint8 (h, w, 3).
        classes: Distinct names; their order gives the ids of the label map.
        selection: Of references, as a :class:`~loraseg.inference.retrieval.RetrievalStage` picks
            them.
        attention: Whether adapters of the CLIP attention act; None if there are none.
        maps: Any of ``confidence`` and ``entropy``.
        tiling: Whether the image is cut into overlapping tiles; ``auto`` decides by its size.
        deadline: When the answer is worthless, as ``time.time()``.
    """

    image: ndarray
    classes: tuple[str, ...]
    selection: AdapterSelection
    attention: AttentionLoraState | None = None
    maps: frozenset[str] = field(default_factory=frozenset[str])
    tiling: TilingMode = "auto"
    deadline: float = float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationResult:
    """The result of one task.

    Attributes:
        segmentation: Label map, further maps and explanation.
        batch_size: How many images went through the model together.
        timing_ms: ``load`` of its adapters, and ``segment`` of the whole batch.
    """

    segmentation: Segmentation
    batch_size: int
    timing_ms: Mapping[str, float]


@dataclass(eq=False, slots=True)
class PreparedRequest:
    """A task whose adapters are in memory and stay there until :meth:`release`.

    Attributes:
        request: What it is.
        job: The same as the model needs it.
        runner: The model that it needs.
        is_tiled: Whether it is to be cut into tiles.
        load_ms: How long its adapters took.
    """

    request: SegmentationRequest
    job: SegmentJob
    runner: SegmentRunner
    is_tiled: bool
    load_ms: float
    _pins: ExitStack

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """What tasks must share to go through the model together."""
        return id(self.runner), self.request.classes

    def release(self) -> None:
        """Let go of the adapters; harmless when repeated."""
        self._pins.close()


class SegmentationStage:
    """Loads, fuses and segments.

    Preparing may go on in any number of threads while one thread runs the model.
    """

    def __init__(
        self, get_runner: Callable[[AttentionLoraState | None], SegmentRunner], cache: AdapterCache
    ) -> None:
        """Use models and a cache of adapters.

        Args:
            get_runner: Gives the model for either kind of CLIP attention, any for None; called
                under a lock.
            cache: Loads :class:`~loraseg.inference.adapter_ref.AdapterRef`; the runners load from
                it.
        """
        self._get_runner, self.cache = get_runner, cache
        self._runner_lock = threading.Lock()
        self._load_pool = ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="load")

    def runner(self, attention: AttentionLoraState | None = None) -> SegmentRunner:
        """Return the model for one kind of CLIP attention, any for None."""
        with self._runner_lock:
            return self._get_runner(attention)

    def prepare(self, request: SegmentationRequest) -> PreparedRequest:
        """Load, pin and fuse the adapters of a task. From any thread.

        Raises:
            AdapterUnavailableError: Some of its adapters cannot be loaded or do not fit; it names
                all of them.
            ServiceError: ``invalid``: too large to be done without tiles.
        """
        runner = self.runner(request.attention)
        height, width = request.image.shape[:2]
        is_tiled = request.tiling == "always" or (
            request.tiling == "auto" and needs_tiling(height, width, runner.predictor)
        )
        if not is_tiled and score_bytes(request) > _MAX_SCORE_BYTES:
            raise ServiceError(
                "invalid",
                f"an image of {width} x {height} pixels with {len(request.classes)} classes is too "
                "large to be done in one piece; allow tiling",
            )
        started = time.perf_counter()
        pins = ExitStack()
        try:
            self._pin_all([part.entry for part in request.selection.adapters], pins)
            mix = runner.fuse(request.selection)
        except UnusableAdaptersError as error:
            pins.close()
            raise AdapterUnavailableError(_adapter_failures(error)) from error
        except BaseException:
            pins.close()
            raise
        job = SegmentJob(
            image=request.image, selection=request.selection, mix=mix, maps=request.maps
        )
        load_ms = (time.perf_counter() - started) * 1000
        return PreparedRequest(request, job, runner, is_tiled, load_ms, pins)

    def run(
        self, prepared: Sequence[PreparedRequest], classes: Sequence[str]
    ) -> list[SegmentationResult | LorasegError]:
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
            SegmentationResult(
                segmentation=result,
                batch_size=len(prepared),
                timing_ms={"load": each.load_ms, "segment": spent_ms},
            )
            for each, result in zip(prepared, results, strict=True)
        ]

    def run_tiled(self, prepared: PreparedRequest) -> Generator[None, None, SegmentationResult]:
        """Segment a task by tiles. One thread at a time.

        Yields after every batch of tiles, so that other images may pass; closing gives up.
        """
        spent = 0.0
        tiles = prepared.runner.run_tiled(prepared.job, prepared.request.classes)
        while True:
            started = time.perf_counter()
            try:
                next(tiles)
            except StopIteration as end:
                spent += time.perf_counter() - started
                timing = {"load": prepared.load_ms, "segment": spent * 1000}
                return SegmentationResult(segmentation=end.value, batch_size=1, timing_ms=timing)
            spent += time.perf_counter() - started
            yield

    def close(self) -> None:
        """End its threads."""
        self._load_pool.shutdown(wait=False, cancel_futures=True)

    def _pin_all(self, entries: Collection[AdapterEntry], pins: ExitStack) -> None:
        """Hold the entries, those that have to be loaded side by side."""
        absent = [entry for entry in entries if entry.digest not in self.cache]
        hurry = self._load_pool.map if len(absent) > 1 else map
        errors: list[Exception] = []
        # Waits for all of them, so that none stays pinned when another fails.
        for held in [
            *hurry(self._pin_one, absent),
            *map(self._pin_one, set(entries) - set(absent)),
        ]:
            if isinstance(held, Exception):
                errors.append(held)
            else:
                pins.push(held)
        unusable = [error for error in errors if isinstance(error, UnusableAdaptersError)]
        if unusable:
            raise UnusableAdaptersError([failure for one in unusable for failure in one.failures])
        if errors:
            raise errors[0]

    def _pin_one(self, entry: AdapterEntry) -> AbstractContextManager[Any] | Exception:
        held = self.cache.hold([entry])
        try:
            held.__enter__()
        except Exception as error:  # noqa: BLE001  raised by whoever collects the others
            return error
        return held


def score_bytes(request: SegmentationRequest) -> int:
    """Return the memory for all scores of an untiled image."""
    height, width = request.image.shape[:2]
    return 4 * len(request.classes) * height * width


def _adapter_failures(error: UnusableAdaptersError) -> tuple[AdapterFailure, ...]:
    refs = ((cast(AdapterRef, entry), reason) for entry, reason in error.failures)
    return tuple(AdapterFailure.from_error(ref, reason) for ref, reason in refs)
