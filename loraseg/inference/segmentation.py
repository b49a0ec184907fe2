"""The second stage: load and fuse the selected adapters, run images through the model."""

import threading
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

from loraseg.errors import LorasegError, ServiceError
from loraseg.fuse.mix import Mix
from loraseg.inference.adapter_cache import AdapterCache
from loraseg.inference.adapter_ref import AdapterEntry, AdapterFailure, AdapterUnavailableError
from loraseg.inference.model_variants import ModelVariants
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.runner import SegmentRunner
from loraseg.inference.selection import AdapterSelection, AttentionLoraState
from loraseg.segment.open_vocabulary.predictor import PredictionMode, Predictor
from loraseg.segment.open_vocabulary.tiled_inference import needs_tiling

__all__ = ["PreparedRequest", "SegmentationStage", "score_bytes"]

_LOAD_THREADS = 16
# Scores of one image are held whole unless it is cut into tiles.
_MAX_SCORE_BYTES = 4 * 2**30


@dataclass(eq=False, slots=True)
class PreparedRequest:
    """A request whose adapters stay in memory until :meth:`release`.

    Attributes:
        request: The request, with its selection.
        mix: Its fused adapters; None for the bare base.
        runner: The model that it needs.
        is_tiled: Whether the image is cut into tiles.
        load_ms: Time to load and fuse the adapters.
    """

    request: SegmentRequest
    mix: Mix | None
    runner: SegmentRunner
    is_tiled: bool
    load_ms: float
    _pins: ExitStack

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Key that is equal for requests that can go through the model together."""
        return id(self.runner), self.request.classes

    def release(self) -> None:
        """Unpin the adapters; a second call has no effect."""
        self._pins.close()


class SegmentationStage:
    """Loads and fuses the adapters of requests and segments their images.

    Any number of threads may prepare requests while one thread runs the model.
    """

    def __init__(
        self, models: ModelVariants, cache: AdapterCache, *, mode: PredictionMode = "plain"
    ) -> None:
        """Use a base and a cache of adapters.

        Args:
            models: The base; used with a lock held.
            cache: Loads :class:`~loraseg.inference.adapter_ref.AdapterRef`.
            mode: As of :class:`~loraseg.segment.open_vocabulary.predictor.Predictor`.
        """
        self.cache = cache
        self._models = models
        self._mode: PredictionMode = mode
        self._runners: dict[AttentionLoraState, SegmentRunner] = {}
        self._runner_lock = threading.Lock()
        self._load_pool = ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="load")

    def runner(self, attention: AttentionLoraState | None = None) -> SegmentRunner:
        """Return the model for a kind of CLIP attention, any model for None."""
        with self._runner_lock:
            base = self._models.get(attention)
            kind = base.clip_attention_lora
            if kind not in self._runners:
                self._runners[kind] = SegmentRunner(Predictor(base, mode=self._mode), self.cache)
            return self._runners[kind]

    def prepare(self, request: SegmentRequest) -> PreparedRequest:
        """Load, pin and fuse the adapters of a request; without a selection, none. Thread-safe.

        Raises:
            AdapterUnavailableError: Some of its adapters cannot be loaded or do not fit; it lists
                all of them.
            ServiceError: ``invalid``: the image is too large to be segmented without tiles.
        """
        if request.selection is None:
            request = replace(request, selection=AdapterSelection("base"))
        selection = request.selection or AdapterSelection("base")
        runner = self.runner(selection.attention)
        height, width = request.image.shape[:2]
        is_tiled = request.tiling == "always" or (
            request.tiling == "auto" and needs_tiling(height, width, runner.predictor)
        )
        if not is_tiled and score_bytes(request) > _MAX_SCORE_BYTES:
            raise ServiceError(
                "invalid",
                f"an image of {width} x {height} pixels with {len(request.classes)} classes is too "
                "large to be segmented as a whole; allow tiling",
            )
        started = time.perf_counter()
        pins = ExitStack()
        try:
            self._pin_all([part.entry for part in selection.adapters], pins)
            mix = runner.fuse(selection)
        except BaseException:
            pins.close()
            raise
        load_ms = (time.perf_counter() - started) * 1000
        return PreparedRequest(request, mix, runner, is_tiled, load_ms, pins)

    def run(self, prepared: Sequence[PreparedRequest]) -> list[SegmentResult | LorasegError]:
        """Segment requests of one ``batch_key``, none of them tiled. Not thread-safe.

        Returns:
            The result of each, or its own error; an error of one does not affect the others.
        """
        started = time.perf_counter()
        try:
            results = prepared[0].runner.run(
                [item.request for item in prepared], [item.mix for item in prepared]
            )
        except LorasegError as error:
            if len(prepared) == 1:
                return [error]
            return [result for item in prepared for result in self.run([item])]
        segment_ms = (time.perf_counter() - started) * 1000
        return [
            _with_timing(result, item.load_ms, segment_ms)
            for item, result in zip(prepared, results, strict=True)
        ]

    def run_tiled(self, prepared: PreparedRequest) -> Generator[None, None, SegmentResult]:
        """Segment a request by tiles. Not thread-safe.

        Yields after every batch of tiles, so that other images can run between them; closing the
        generator stops the work.
        """
        segment_s = 0.0
        tiles = prepared.runner.run_tiled(prepared.request, prepared.mix)
        while True:
            started = time.perf_counter()
            try:
                next(tiles)
            except StopIteration as stop:
                segment_s += time.perf_counter() - started
                return _with_timing(stop.value, prepared.load_ms, segment_s * 1000)
            segment_s += time.perf_counter() - started
            yield

    def close(self) -> None:
        """Stop the loading threads."""
        self._load_pool.shutdown(wait=False, cancel_futures=True)

    def _pin_all(self, entries: Collection[AdapterEntry], pins: ExitStack) -> None:
        """Pin the entries; those not in the cache are loaded in parallel."""
        absent = [entry for entry in entries if entry.digest not in self.cache]
        map_absent = self._load_pool.map if len(absent) > 1 else map
        errors: list[Exception] = []
        # Waits for all loads, so that none stays pinned when another fails.
        for pin in [
            *map_absent(self._pin_one, absent),
            *map(self._pin_one, set(entries) - set(absent)),
        ]:
            if isinstance(pin, Exception):
                errors.append(pin)
            else:
                pins.push(pin)
        unavailable = [error for error in errors if isinstance(error, AdapterUnavailableError)]
        if unavailable:
            failures: list[AdapterFailure] = []
            for error in unavailable:
                failures += error.failures
            raise AdapterUnavailableError(failures) from unavailable[0].__cause__
        if errors:
            raise errors[0]

    def _pin_one(self, entry: AdapterEntry) -> AbstractContextManager[Any] | Exception:
        pin = self.cache.hold([entry])
        try:
            pin.__enter__()
        except Exception as error:  # noqa: BLE001  raised by _pin_all
            return error
        return pin


def score_bytes(request: SegmentRequest) -> int:
    """Return the size of all scores of an untiled image."""
    height, width = request.image.shape[:2]
    return 4 * len(request.classes) * height * width


def _with_timing(result: SegmentResult, load_ms: float, segment_ms: float) -> SegmentResult:
    timing: Mapping[str, float] = {"load": load_ms, "segment": segment_ms}
    return replace(result, timing_ms={**result.timing_ms, **timing})
