"""Calls of a deployment, batched on the caller's side.

A call between replicas takes milliseconds of CPU time on either side, as long as the model needs
for a small image. Items that arrive while other calls run therefore share a call.
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

# Limits the replicas that an image can bring down.
_MAX_ATTEMPTS = 3
_RETRY_DELAY_S = 0.25
# A loss is reported this long before the deadline, while the client still waits.
_DEADLINE_MARGIN_S = 0.1

IndexedResults = Sequence[tuple[int, Any]]


class Item(Protocol):
    """An item of a call."""

    @property
    def deadline(self) -> float:
        """The ``time.time()`` after which its result is not used."""
        ...


ItemT = TypeVar("ItemT", bound=Item)
ResultT = TypeVar("ResultT")


class ResponseStream(Protocol):
    """The streaming response of a deployment handle."""

    def __aiter__(self) -> AsyncIterator[IndexedResults]:
        """Yield results with the index of their item; an error is the result of that item only."""
        ...

    def cancel(self) -> None:
        """Cancel the call."""
        ...


@dataclass(eq=False, slots=True)
class _PendingCall(Generic[ItemT]):
    item: ItemT
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
    """Sends items to the replicas of one deployment. Used from one event loop.

    The items of a replica that dies are sent again, each in its own call.
    """

    def __init__(
        self,
        call: Callable[[list[ItemT]], ResponseStream],
        *,
        name: str,
        batch_key: Callable[[ItemT], Hashable | None],
        max_batch_size: int,
        linger_s: float,
    ) -> None:
        """Create it.

        Args:
            call: Sends a list of items, which must be picklable.
            name: Name of the deployment, for messages.
            batch_key: Items with equal keys may share a call; None for a call of its own.
            max_batch_size: Maximum number of items in a call.
            linger_s: Time that an item waits for others while calls run.
        """
        self._call, self._name, self._batch_key = call, name, batch_key
        self._max_batch_size, self._linger_s = max_batch_size, linger_s
        self._pending: list[_PendingCall[ItemT]] = []
        self._in_flight: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def submit(self, item: ItemT) -> ResultT:
        """Send one item and return its result; cancelling the last item cancels the call.

        Raises:
            ServiceError: ``replica_lost``, ``overloaded``, ``not_ready``.
            LorasegError: The result, if it is an error.
        """
        call = _PendingCall(item, asyncio.get_running_loop().create_future())
        self._pending.append(call)
        self._schedule_flush()
        return await call.future

    def _schedule_flush(self) -> None:
        """Flush now if a batch is full, else after the linger time."""
        if len(self._pending) >= self._max_batch_size:
            self._flush()
        elif self._pending and self._timer is None:
            delay_s = self._linger_s if self._in_flight else 0.0
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending = [call for call in self._pending if not call.future.done()]
        self._pending = []
        batches: dict[Hashable, list[_PendingCall[ItemT]]] = {}
        for call in pending:
            key = self._batch_key(call.item)
            batches.setdefault(id(call) if key is None else (key,), []).append(call)
        for batch in batches.values():
            for start in range(0, len(batch), self._max_batch_size):
                self._launch(batch[start : start + self._max_batch_size])

    def _launch(self, calls: list[_PendingCall[ItemT]]) -> None:
        task = asyncio.get_running_loop().create_task(self._run_call(calls))
        self._in_flight.add(task)
        task.add_done_callback(self._on_call_done)

        def cancel_if_unused(_: "asyncio.Future[Any]") -> None:
            if all(call.future.cancelled() for call in calls):
                task.cancel()

        for call in calls:
            call.future.add_done_callback(cancel_if_unused)

    def _on_call_done(self, task: "asyncio.Task[None]") -> None:
        self._in_flight.discard(task)
        if self._pending:
            self._flush()

    async def _run_call(self, calls: list[_PendingCall[ItemT]]) -> None:
        response = self._call([call.item for call in calls])
        error: Exception | None = None
        try:
            async for results in response:
                for index, result in results:
                    calls[index].resolve(result)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as problem:  # noqa: BLE001  becomes the result of the items
            error = problem
        unresolved = [call for call in calls if not call.future.done()]
        if not unresolved:
            return
        client_error = self._client_error(error)
        for call in unresolved:
            if client_error is None:
                self._retry(call, error)
            else:
                call.resolve(client_error)

    def _client_error(self, error: Exception | None) -> LorasegError | None:
        """Return the result of a failed call; None if its replica was lost."""
        if isinstance(error, BackPressureError):
            return ServiceError("overloaded", f"{self._name} is overloaded", retry_after_s=1.0)
        if isinstance(error, DeploymentUnavailableError):
            return ServiceError("not_ready", f"{self._name} is not running", retry_after_s=5.0)
        if isinstance(error, RayTaskError) or not isinstance(error, RayError | RayServeException):
            # Replicas return expected errors; an error that they raise is a bug.
            logger.error("a call to %s failed", self._name, exc_info=error)
            return StageError(f"a call to {self._name} failed: {type(error).__name__}")
        return None

    def _retry(self, call: _PendingCall[ItemT], error: Exception | None) -> None:
        """Send an item again, to another replica."""
        call.failed_attempts += 1
        loop, remaining_s = asyncio.get_running_loop(), call.item.deadline - time.time()
        delay_s = _RETRY_DELAY_S * (call.failed_attempts - 1)
        logger.warning("a replica of %s was lost: %s", self._name, type(error).__name__)
        if call.failed_attempts >= _MAX_ATTEMPTS or remaining_s <= delay_s + _DEADLINE_MARGIN_S:
            call.resolve(self._replica_lost())
            return
        timer = loop.call_later(
            remaining_s - _DEADLINE_MARGIN_S, lambda: call.resolve(self._replica_lost())
        )
        call.future.add_done_callback(lambda _: timer.cancel())
        loop.call_later(delay_s, self._launch, [call])

    def _replica_lost(self) -> ServiceError:
        return ServiceError(
            "replica_lost",
            f"the replica of {self._name} that processed the request was lost",
            retry_after_s=2.0,
        )
