"""From one deployment to another: what is sent at about the same time travels in one call.

A call between replicas costs milliseconds of CPU on either side, as much as a small image in the
model. A busy gateway therefore bundles; an idle one sends at once.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from loraseg.errors import LorasegError, ServiceError, StageError

__all__ = ["CallBatcher", "IndexedResults", "ResponseStream"]

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

# An image that brings down whoever works on it must not go round for ever.
_MAX_ATTEMPTS = 3
_RETRY_DELAY_S = 0.25
# Told a little before the deadline, or nobody would hear it.
_DEADLINE_MARGIN_S = 0.1

IndexedResults = Sequence[tuple[int, Any]]


class ResponseStream(Protocol):
    """A streaming response of a deployment handle: positions in the bundle with their answers."""

    def __aiter__(self) -> AsyncIterator[IndexedResults]:
        """Yield answers as they come; an answer that is an error belongs to its item alone."""
        ...

    def cancel(self) -> None:
        """Give up the call."""
        ...


@dataclass(eq=False, slots=True)
class _PendingCall:
    item: Any
    key: Hashable | None
    deadline: float
    future: "asyncio.Future[Any]"
    failed_attempts: int = 0

    def resolve(self, result: Any) -> None:
        if self.future.done():
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class CallBatcher(Generic[ItemT, ResultT]):
    """Brings items to the replicas of one deployment. Used from one event loop.

    What a dead replica had in hand is sent again, each item by itself.
    """

    def __init__(
        self,
        call: Callable[[list[ItemT]], ResponseStream],
        *,
        name: str,
        max_batch_size: int,
        linger_s: float,
    ) -> None:
        """Prepare.

        Args:
            call: Sends a bundle.
            name: Of the deployment, for messages.
            max_batch_size: Items in one call.
            linger_s: How long an item waits for company while other calls are under way.
        """
        self._call, self._name = call, name
        self._max_batch_size, self._linger_s = max_batch_size, linger_s
        self._pending: list[_PendingCall] = []
        self._in_flight: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def submit(self, item: ItemT, *, key: Hashable | None, deadline: float) -> ResultT:
        """Send one item and return its answer. Cancelling gives it up.

        Args:
            item: Anything that can be pickled.
            key: Items with equal keys may share a call; None for a call of its own.
            deadline: When the answer is worthless, as ``time.time()``.

        Raises:
            ServiceError: ``replica_lost``, ``overloaded``, ``not_ready``.
            LorasegError: The answer itself, if it is an error.
        """
        parcel = _PendingCall(item, key, deadline, asyncio.get_running_loop().create_future())
        self._pending.append(parcel)
        self._schedule_flush()
        return await parcel.future

    def _schedule_flush(self) -> None:
        """See to it that what waits is sent in time."""
        if len(self._pending) >= self._max_batch_size:
            self._flush()
        elif self._pending and self._timer is None:
            delay_s = self._linger_s if self._in_flight else 0.0
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = [parcel for parcel in self._pending if not parcel.future.done()]
        self._pending = []
        bundles: dict[Hashable, list[_PendingCall]] = {}
        for parcel in waiting:
            alone = parcel.key is None or parcel.failed_attempts
            bundles.setdefault(id(parcel) if alone else (parcel.key,), []).append(parcel)
        for bundle in bundles.values():
            for start in range(0, len(bundle), self._max_batch_size):
                self._launch(bundle[start : start + self._max_batch_size])

    def _launch(self, calls: list[_PendingCall]) -> None:
        task = asyncio.get_running_loop().create_task(self._run_call(calls))
        self._in_flight.add(task)
        task.add_done_callback(self._on_call_done)

        def give_up(_: "asyncio.Future[Any]") -> None:
            if all(parcel.future.cancelled() for parcel in calls):
                task.cancel()

        for parcel in calls:
            parcel.future.add_done_callback(give_up)

    def _on_call_done(self, task: "asyncio.Task[None]") -> None:
        self._in_flight.discard(task)
        if self._pending:
            self._flush()

    async def _run_call(self, calls: list[_PendingCall]) -> None:
        reply = self._call([parcel.item for parcel in calls])
        error: Exception | None = None
        try:
            async for answers in reply:
                for index, answer in answers:
                    calls[index].resolve(answer)
        except asyncio.CancelledError:
            reply.cancel()
            raise
        except Exception as problem:  # noqa: BLE001  it belongs to whoever waits
            error = problem
        left = [parcel for parcel in calls if not parcel.future.done()]
        if not left:
            return
        told = self._client_error(error)
        for parcel in left:
            if told is None:
                self._retry(parcel, error)
            else:
                parcel.resolve(told)

    def _client_error(self, error: Exception | None) -> LorasegError | None:
        """Return what to say about a call that failed; None if its replica was lost."""
        if isinstance(error, BackPressureError):
            return ServiceError("overloaded", f"{self._name} is busy", retry_after_s=1.0)
        if isinstance(error, DeploymentUnavailableError):
            return ServiceError("not_ready", f"{self._name} is not running", retry_after_s=5.0)
        if isinstance(error, RayTaskError) or not isinstance(error, RayError | RayServeException):
            # Replicas answer with errors; one that is raised is a fault.
            logger.error("a call to %s failed", self._name, exc_info=error)
            return StageError(f"a call to {self._name} failed: {type(error).__name__}")
        return None

    def _retry(self, call: _PendingCall, error: Exception | None) -> None:
        """Send it again, to another replica."""
        call.failed_attempts += 1
        loop, left_s = asyncio.get_running_loop(), call.deadline - time.time()
        pause_s = _RETRY_DELAY_S * (call.failed_attempts - 1)
        logger.warning("a replica of %s was lost: %s", self._name, type(error).__name__)
        if call.failed_attempts >= _MAX_ATTEMPTS or left_s <= pause_s + _DEADLINE_MARGIN_S:
            call.resolve(self._replica_lost())
            return
        last = loop.call_later(
            left_s - _DEADLINE_MARGIN_S, lambda: call.resolve(self._replica_lost())
        )
        call.future.add_done_callback(lambda _: last.cancel())
        loop.call_later(pause_s, self._launch, [call])

    def _replica_lost(self) -> ServiceError:
        return ServiceError(
            "replica_lost",
            f"the replica of {self._name} that worked on the request was lost",
            retry_after_s=2.0,
        )
