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

# Many, because one that waits for a slow store must not keep back those that need nothing of it.
_PREPARE_THREADS = 32
_MAX_CONCURRENT_TILED = 2
# Of all images of one batch; a single one may have more.
_MAX_BATCH_SCORE_BYTES = 512 * 2**20


@dataclass(eq=False, slots=True)
class _PendingRequest:
    """A task on its way.

    Attributes:
        request: What it is.
        future: Where the answer goes. Whoever cancels it gives up the work.
        prepared: Once its adapters are loaded.
        ready_since: When it joined the queue before the model, as ``time.monotonic()``.
        tiles: The running work, for a tiled image.
        is_resolved: Whether it has its answer.
    """

    request: SegmentRequest
    future: "Future[SegmentResult]"
    prepared: PreparedRequest | None = None
    ready_since: float = 0.0
    tiles: Generator[None, None, SegmentResult] | None = None
    is_resolved: bool = False

    def resolve(self, result: SegmentResult | BaseException) -> None:
        """Give the answer, unless nobody waits for it any more, and let go of the adapters."""
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
        """Tell whether nobody waits any more; a task past its deadline is told so."""
        if self.is_resolved:
            return True
        if self.future.cancelled() or time.time() >= self.request.deadline:
            self.resolve(ServiceError("deadline", "the time for the request is over"))
        return self.is_resolved


class MicroBatcher:
    """Segments tasks in the order in which they are ready, those of one group together.

    Tiled images are worked on between batches, so that none holds up the others. Tasks that are
    cancelled or past their deadline are dropped.
    """

    def __init__(
        self,
        stage: SegmentationStage,
        *,
        max_batch_size: int,
        max_wait_s: float,
        max_in_flight: int,
    ) -> None:
        """Start its threads.

        Args:
            stage: Used by no other lane.
            max_batch_size: Most images that go through the model together.
            max_wait_s: How long the first of a batch waits for company while the model is idle.
            max_in_flight: Most tasks at once; beyond it they are refused.
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
        """Take a task; cancelling the future gives up the work as soon as possible.

        The future raises what :meth:`SegmentationStage.prepare` raises, ServiceError ``deadline``,
        or what went wrong in the model.

        Raises:
            ServiceError: ``overloaded``, or ``draining`` once it is closed.
        """
        ticket = _PendingRequest(request, Future())
        with self._condition:
            if self._is_closed:
                raise draining_error()
            if self._in_flight >= self._max_in_flight:
                raise overloaded_error(self._max_in_flight)
            if not self._in_flight:
                self._last_progress = time.monotonic()
            self._in_flight += 1
        ticket.future.add_done_callback(self._decrement_in_flight)
        self._prepare_pool.submit(self._prepare, ticket)
        return ticket.future

    @property
    def in_flight(self) -> int:
        """How many tasks were taken and are not answered yet."""
        return self._in_flight

    @property
    def stalled_s(self) -> float:
        """Seconds since the model last finished anything, 0 while there is nothing to do.

        Infinite if its thread has died.
        """
        if not self._thread.is_alive() and not self._is_closed:
            return float("inf")
        return time.monotonic() - self._last_progress if self._in_flight else 0.0

    def close(self) -> None:
        """Refuse what waits and what comes; what is in the model is finished."""
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
        except Exception as error:  # noqa: BLE001  it belongs to whoever waits
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
        for ticket in (*self._ready, *self._tiled):
            ticket.resolve(draining_error())

    def _next_batch(self) -> list[_PendingRequest] | None:
        """Return what goes through the model next, [] for only a tiled image, None at the end."""
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
                rest_s = self._ready[0].ready_since + self._max_wait_s - time.monotonic()
                if len(batch) == self._max_batch_size or rest_s <= 0 or self._tiled:
                    for ticket in batch:
                        self._ready.remove(ticket)
                    return batch
                self._condition.wait(rest_s)
        return None

    def _compatible_batch(self) -> list[_PendingRequest]:
        """Return the oldest task and those that can go with it."""
        batch: list[_PendingRequest] = []
        room = _MAX_BATCH_SCORE_BYTES
        for ticket in self._ready:
            prepared = ticket.prepared
            if prepared is None or (batch and prepared.batch_key != _batch_key(batch[0])):
                continue
            room -= score_bytes(ticket.request)
            if batch and (room < 0 or len(batch) == self._max_batch_size):
                break
            batch.append(ticket)
        return batch

    def _run_batch(self, batch: list[_PendingRequest]) -> None:
        prepared = [ticket.prepared for ticket in batch if ticket.prepared is not None]
        try:
            answers = self._stage.run(prepared)
        except Exception as error:
            logger.exception("a batch of %d failed", len(batch))
            answers = [error] * len(batch)
        for ticket, answer in zip(batch, answers, strict=True):
            ticket.resolve(answer)

    def _run_tiled_step(self) -> None:
        """Work on one of the tiled images for a while."""
        with self._condition:
            if not self._tiled:
                return
            ticket = self._tiled[0]
            # In turns, but not so many at once that their memory adds up.
            if len(self._tiled) >= _MAX_CONCURRENT_TILED:
                self._tiled.insert(_MAX_CONCURRENT_TILED - 1, self._tiled.popleft())
        if ticket.is_expired() or ticket.prepared is None:
            return
        try:
            if ticket.tiles is None:
                ticket.tiles = self._stage.run_tiled(ticket.prepared)
            next(ticket.tiles)
            return
        except StopIteration as end:
            answer = end.value
        except LorasegError as error:
            answer = error
        except Exception as error:
            logger.exception("a tiled image failed")
            answer = error
        ticket.resolve(answer)


def _batch_key(pending: _PendingRequest) -> object:
    return pending.prepared.batch_key if pending.prepared else None
