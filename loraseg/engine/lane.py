"""A queue before the model: adapters are loaded by many threads, images segmented by one."""

import logging
import threading
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from loraseg.engine.segmenting import Prepared, Segmented, SegmentStage, Task, score_bytes
from loraseg.errors import LorasegError, ServiceError

__all__ = ["Lane"]

logger = logging.getLogger(__name__)

# Many, because one that waits for a slow store must not keep back those that need nothing of it.
_PREPARERS = 32
_TILED_AT_ONCE = 2
# Of all images of one batch; a single one may have more.
_BATCH_SCORE_BYTES = 512 * 2**20


@dataclass(eq=False, slots=True)
class _Ticket:
    """A task on its way.

    Attributes:
        task: What it is.
        future: Where the answer goes. Whoever cancels it gives up the work.
        prepared: Once its adapters are loaded.
        since: When it joined the queue before the model, as ``time.monotonic()``.
        tiles: The running work, for a tiled image.
        is_settled: Whether it has its answer.
    """

    task: Task
    future: "Future[Segmented]"
    prepared: Prepared | None = None
    since: float = 0.0
    tiles: Generator[None, None, Segmented] | None = None
    is_settled: bool = False

    def settle(self, answer: Segmented | BaseException) -> None:
        """Give the answer, unless nobody waits for it any more, and let go of the adapters."""
        if self.is_settled:
            return
        self.is_settled = True
        if self.tiles is not None:
            self.tiles.close()
        if self.prepared is not None:
            self.prepared.release()
        if self.future.set_running_or_notify_cancel():
            if isinstance(answer, BaseException):
                self.future.set_exception(answer)
            else:
                self.future.set_result(answer)

    def is_over(self) -> bool:
        """Tell whether nobody waits any more; a task past its deadline is told so."""
        if self.is_settled:
            return True
        if self.future.cancelled() or time.time() >= self.task.deadline:
            self.settle(ServiceError("deadline", "the time for the request is over"))
        return self.is_settled


class Lane:
    """Segments tasks in the order in which they are ready, those of one group together.

    Tiled images are worked on between batches, so that none holds up the others. Tasks that are
    cancelled or past their deadline are dropped.
    """

    def __init__(self, stage: SegmentStage, *, batch: int, wait_s: float, limit: int) -> None:
        """Start its threads.

        Args:
            stage: Used by no other lane.
            batch: Most images that go through the model together.
            wait_s: How long the first of a batch waits for company while the model is idle.
            limit: Most tasks at once; beyond it they are refused.
        """
        self._stage = stage
        self._batch, self._wait_s, self._limit = batch, wait_s, limit
        self._preparers = ThreadPoolExecutor(_PREPARERS, thread_name_prefix="prepare")
        self._changed = threading.Condition()
        self._ready: deque[_Ticket] = deque()
        self._tiled: deque[_Ticket] = deque()
        self._under_way = 0
        self._progress_at = time.monotonic()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="segment", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> "Future[Segmented]":
        """Take a task; cancelling the future gives up the work as soon as possible.

        The future raises what :meth:`SegmentStage.prepare` raises, ServiceError ``deadline``, or
        what went wrong in the model.

        Raises:
            ServiceError: ``overloaded``, or ``draining`` once it is closed.
        """
        ticket = _Ticket(task, Future())
        with self._changed:
            if self._is_closed:
                raise ServiceError("draining", "the service is shutting down", retry_after_s=5.0)
            if self._under_way >= self._limit:
                raise ServiceError(
                    "overloaded", f"{self._limit} images are waiting already", retry_after_s=1.0
                )
            if not self._under_way:
                self._progress_at = time.monotonic()
            self._under_way += 1
        ticket.future.add_done_callback(self._count_out)
        self._preparers.submit(self._prepare, ticket)
        return ticket.future

    @property
    def under_way(self) -> int:
        """How many tasks were taken and are not answered yet."""
        return self._under_way

    @property
    def stuck_s(self) -> float:
        """Seconds since the model last finished anything, 0 while there is nothing to do.

        Infinite if its thread has died.
        """
        if not self._thread.is_alive() and not self._is_closed:
            return float("inf")
        return time.monotonic() - self._progress_at if self._under_way else 0.0

    def close(self) -> None:
        """Refuse what waits and what comes; what is in the model is finished."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._preparers.shutdown(wait=False)
        self._thread.join(timeout=60)
        self._stage.close()

    def _count_out(self, _: "Future[Segmented]") -> None:
        with self._changed:
            self._under_way -= 1

    def _prepare(self, ticket: _Ticket) -> None:
        if ticket.is_over():
            return
        try:
            ticket.prepared = self._stage.prepare(ticket.task)
        except Exception as error:  # noqa: BLE001  it belongs to whoever waits
            ticket.settle(error)
            return
        ticket.since = time.monotonic()
        with self._changed:
            if not self._is_closed:
                (self._tiled if ticket.prepared.is_tiled else self._ready).append(ticket)
                self._changed.notify()
                return
        ticket.settle(_draining())

    def _work(self) -> None:
        while True:
            batch = self._next()
            if batch is None:
                break
            if batch:
                self._run(batch)
            self._step()
            self._progress_at = time.monotonic()
        for ticket in (*self._ready, *self._tiled):
            ticket.settle(_draining())

    def _next(self) -> list[_Ticket] | None:
        """Return what goes through the model next, [] for only a tiled image, None at the end."""
        with self._changed:
            while not self._is_closed:
                self._ready = deque(t for t in self._ready if not t.is_over())
                self._tiled = deque(t for t in self._tiled if not t.is_over())
                if not self._ready:
                    if self._tiled:
                        return []
                    self._changed.wait(1.0)
                    continue
                batch = self._company()
                rest_s = self._ready[0].since + self._wait_s - time.monotonic()
                if len(batch) == self._batch or rest_s <= 0 or self._tiled:
                    for ticket in batch:
                        self._ready.remove(ticket)
                    return batch
                self._changed.wait(rest_s)
        return None

    def _company(self) -> list[_Ticket]:
        """Return the oldest task and those that can go with it."""
        batch: list[_Ticket] = []
        room = _BATCH_SCORE_BYTES
        for ticket in self._ready:
            prepared = ticket.prepared
            if prepared is None or (batch and prepared.group != _group(batch[0])):
                continue
            room -= score_bytes(ticket.task)
            if batch and (room < 0 or len(batch) == self._batch):
                break
            batch.append(ticket)
        return batch

    def _run(self, batch: list[_Ticket]) -> None:
        prepared = [ticket.prepared for ticket in batch if ticket.prepared is not None]
        try:
            answers = self._stage.run(prepared, batch[0].task.classes)
        except Exception as error:
            logger.exception("a batch of %d failed", len(batch))
            answers = [error] * len(batch)
        for ticket, answer in zip(batch, answers, strict=True):
            ticket.settle(answer)

    def _step(self) -> None:
        """Work on one of the tiled images for a while."""
        with self._changed:
            if not self._tiled:
                return
            ticket = self._tiled[0]
            # In turns, but not so many at once that their memory adds up.
            if len(self._tiled) >= _TILED_AT_ONCE:
                self._tiled.insert(_TILED_AT_ONCE - 1, self._tiled.popleft())
        if ticket.is_over() or ticket.prepared is None:
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
        ticket.settle(answer)


def _group(ticket: _Ticket) -> object:
    return ticket.prepared.group if ticket.prepared else None


def _draining() -> ServiceError:
    return ServiceError("draining", "the service is shutting down", retry_after_s=5.0)
