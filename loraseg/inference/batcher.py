"""A queue before the model: adapters are loaded by many threads, images segmented by one."""

import logging
import threading
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from loraseg.errors import LorasegError, ServiceError
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.segmentation import PreparedRequest, SegmentationStage, score_bytes
from loraseg.inference.service_errors import draining_error, overloaded_error

__all__ = ["MicroBatcher"]

logger = logging.getLogger(__name__)

# More than the model needs, so that requests that wait for a slow store do not block the others.
_PREPARE_THREADS = 32
_MAX_CONCURRENT_TILED = 2
# Limit for all images of one batch; a single image may exceed it.
_MAX_BATCH_SCORE_BYTES = 512 * 2**20


@dataclass(eq=False, slots=True)
class _PendingRequest:
    """A request between :meth:`MicroBatcher.submit` and its result.

    Attributes:
        request: The request.
        future: Receives the result; cancelling it cancels the work.
        prepared: The request with its adapters; None until they are loaded.
        ready_since: ``time.monotonic()`` of its entry into the queue before the model.
        tiles: The running generator of a tiled image.
        is_resolved: Whether the result, an error or the cancellation is final.
    """

    request: SegmentRequest
    future: "Future[SegmentResult]"
    prepared: PreparedRequest | None = None
    ready_since: float = 0.0
    tiles: Generator[None, None, SegmentResult] | None = None
    is_resolved: bool = False

    def resolve(self, result: SegmentResult | BaseException) -> None:
        """Set the future unless it is cancelled, and release the adapters."""
        if self.is_resolved:
            return
        self.is_resolved = True
        if self.tiles is not None:
            self.tiles.close()
        if self.prepared is not None:
            self.prepared.release()
        if self.future.set_running_or_notify_cancel():
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)

    def is_expired(self) -> bool:
        """Return whether no result is needed; a request past its deadline gets an error."""
        if self.is_resolved:
            return True
        if self.future.cancelled() or time.time() >= self.request.deadline:
            self.resolve(ServiceError("deadline", "the deadline of the request has passed"))
        return self.is_resolved


class MicroBatcher:
    """Segments requests in the order in which their adapters are loaded, in batches.

    A batch consists of requests with the same ``batch_key``. Tiled images are segmented tile by
    tile between batches, so that they do not delay other images. Requests that are cancelled or
    past their deadline are dropped.
    """

    def __init__(
        self,
        stage: SegmentationStage,
        *,
        max_batch_size: int,
        max_wait_s: float,
        max_in_flight: int,
    ) -> None:
        """Start the threads.

        Args:
            stage: Must not be used by another batcher.
            max_batch_size: Maximum number of images in one pass through the model.
            max_wait_s: How long the first request of a batch waits for more while the model is
                idle.
            max_in_flight: Maximum number of unfinished requests; further ones are refused.
        """
        self._stage = stage
        self._max_batch_size, self._max_wait_s, self._max_in_flight = (
            max_batch_size,
            max_wait_s,
            max_in_flight,
        )
        self._prepare_pool = ThreadPoolExecutor(_PREPARE_THREADS, thread_name_prefix="prepare")
        self._condition = threading.Condition()
        self._ready: deque[_PendingRequest] = deque()
        self._tiled: deque[_PendingRequest] = deque()
        self._in_flight = 0
        self._last_progress = time.monotonic()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run_loop, name="segment", daemon=True)
        self._thread.start()

    def submit(self, request: SegmentRequest) -> "Future[SegmentResult]":
        """Queue a request; cancelling the future stops the work as soon as possible.

        The future raises what :meth:`SegmentationStage.prepare` raises, ServiceError ``deadline``
        or ``draining``, or an error of the model.

        Raises:
            ServiceError: ``overloaded``, or ``draining`` after :meth:`close`.
        """
        pending = _PendingRequest(request, Future())
        with self._condition:
            if self._is_closed:
                raise draining_error()
            if self._in_flight >= self._max_in_flight:
                raise overloaded_error(self._max_in_flight)
            if not self._in_flight:
                self._last_progress = time.monotonic()
            self._in_flight += 1
        pending.future.add_done_callback(self._decrement_in_flight)
        self._prepare_pool.submit(self._prepare, pending)
        return pending.future

    @property
    def in_flight(self) -> int:
        """Number of unfinished requests."""
        return self._in_flight

    @property
    def stalled_s(self) -> float:
        """Seconds since the model last finished a batch or tile, 0 without unfinished requests.

        Infinite if the thread of the model has died.
        """
        if not self._thread.is_alive() and not self._is_closed:
            return float("inf")
        return time.monotonic() - self._last_progress if self._in_flight else 0.0

    def close(self) -> None:
        """Refuse waiting and new requests; the batch in the model is finished."""
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        self._prepare_pool.shutdown(wait=False)
        self._thread.join(timeout=60)
        self._stage.close()

    def _decrement_in_flight(self, _: "Future[SegmentResult]") -> None:
        with self._condition:
            self._in_flight -= 1

    def _prepare(self, pending: _PendingRequest) -> None:
        if pending.is_expired():
            return
        try:
            pending.prepared = self._stage.prepare(pending.request)
        except Exception as error:  # noqa: BLE001  raised by the future
            pending.resolve(error)
            return
        pending.ready_since = time.monotonic()
        with self._condition:
            if not self._is_closed:
                (self._tiled if pending.prepared.is_tiled else self._ready).append(pending)
                self._condition.notify()
                return
        pending.resolve(draining_error())

    def _run_loop(self) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                break
            if batch:
                self._run_batch(batch)
            self._run_tiled_step()
            self._last_progress = time.monotonic()
        for pending in (*self._ready, *self._tiled):
            pending.resolve(draining_error())

    def _next_batch(self) -> list[_PendingRequest] | None:
        """Return the next batch, [] if there are only tiled images, None after closing."""
        with self._condition:
            while not self._is_closed:
                self._ready = deque(t for t in self._ready if not t.is_expired())
                self._tiled = deque(t for t in self._tiled if not t.is_expired())
                if not self._ready:
                    if self._tiled:
                        return []
                    self._condition.wait(1.0)
                    continue
                batch = self._compatible_batch()
                left_s = self._ready[0].ready_since + self._max_wait_s - time.monotonic()
                if len(batch) == self._max_batch_size or left_s <= 0 or self._tiled:
                    for pending in batch:
                        self._ready.remove(pending)
                    return batch
                self._condition.wait(left_s)
        return None

    def _compatible_batch(self) -> list[_PendingRequest]:
        """Return the oldest request and those that can be in the same batch."""
        batch: list[_PendingRequest] = []
        room = _MAX_BATCH_SCORE_BYTES
        for pending in self._ready:
            prepared = pending.prepared
            if prepared is None or (batch and prepared.batch_key != _batch_key(batch[0])):
                continue
            room -= score_bytes(pending.request)
            if batch and (room < 0 or len(batch) == self._max_batch_size):
                break
            batch.append(pending)
        return batch

    def _run_batch(self, batch: list[_PendingRequest]) -> None:
        prepared = [pending.prepared for pending in batch if pending.prepared is not None]
        try:
            results = self._stage.run(prepared)
        except Exception as error:
            logger.exception("a batch of %d images failed", len(batch))
            results = [error] * len(batch)
        for pending, result in zip(batch, results, strict=True):
            pending.resolve(result)

    def _run_tiled_step(self) -> None:
        """Segment the next tiles of one tiled image."""
        with self._condition:
            if not self._tiled:
                return
            pending = self._tiled[0]
            # Round robin over a few images, since each keeps its maps in memory.
            if len(self._tiled) >= _MAX_CONCURRENT_TILED:
                self._tiled.insert(_MAX_CONCURRENT_TILED - 1, self._tiled.popleft())
        if pending.is_expired() or pending.prepared is None:
            return
        try:
            if pending.tiles is None:
                pending.tiles = self._stage.run_tiled(pending.prepared)
            next(pending.tiles)
            return
        except StopIteration as stop:
            result = stop.value
        except LorasegError as error:
            result = error
        except Exception as error:
            logger.exception("a tiled image failed")
            result = error
        pending.resolve(result)


def _batch_key(pending: _PendingRequest) -> object:
    return pending.prepared.batch_key if pending.prepared else None
