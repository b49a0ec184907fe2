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

__all__ = ["Answers", "Carrier", "Reply"]

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
AnswerT = TypeVar("AnswerT")

# An image that brings down whoever works on it must not go round for ever.
_MOST_LOSSES = 3
_PAUSE_S = 0.25
# Told a little before the deadline, or nobody would hear it.
_LAST_WORDS_S = 0.1

Answers = Sequence[tuple[int, Any]]


class Reply(Protocol):
    """A streaming response of a deployment handle: positions in the bundle with their answers."""

    def __aiter__(self) -> AsyncIterator[Answers]:
        """Yield answers as they come; an answer that is an error belongs to its item alone."""
        ...

    def cancel(self) -> None:
        """Give up the call."""
        ...


@dataclass(eq=False, slots=True)
class _Parcel:
    item: Any
    key: Hashable | None
    deadline: float
    future: "asyncio.Future[Any]"
    losses: int = 0

    def settle(self, answer: Any) -> None:
        if self.future.done():
            return
        if isinstance(answer, BaseException):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


class Carrier(Generic[ItemT, AnswerT]):
    """Brings items to the replicas of one deployment. Used from one event loop.

    What a dead replica had in hand is sent again, each item by itself.
    """

    def __init__(
        self, call: Callable[[list[ItemT]], Reply], *, name: str, most: int, linger_s: float
    ) -> None:
        """Prepare.

        Args:
            call: Sends a bundle.
            name: Of the deployment, for messages.
            most: Items in one call.
            linger_s: How long an item waits for company while other calls are under way.
        """
        self._call, self._name = call, name
        self._most, self._linger_s = most, linger_s
        self._waiting: list[_Parcel] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def send(self, item: ItemT, *, key: Hashable | None, deadline: float) -> AnswerT:
        """Send one item and return its answer. Cancelling gives it up.

        Args:
            item: Anything that can be pickled.
            key: Items with equal keys may share a call; None for a call of its own.
            deadline: When the answer is worthless, as ``time.time()``.

        Raises:
            ServiceError: ``replica_lost``, ``overloaded``, ``not_ready``.
            LorasegError: The answer itself, if it is an error.
        """
        parcel = _Parcel(item, key, deadline, asyncio.get_running_loop().create_future())
        self._waiting.append(parcel)
        self._arrange()
        return await parcel.future

    def _arrange(self) -> None:
        """See to it that what waits is sent in time."""
        if len(self._waiting) >= self._most:
            self._dispatch()
        elif self._waiting and self._timer is None:
            delay_s = self._linger_s if self._calls else 0.0
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._dispatch)

    def _dispatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = [parcel for parcel in self._waiting if not parcel.future.done()]
        self._waiting = []
        bundles: dict[Hashable, list[_Parcel]] = {}
        for parcel in waiting:
            alone = parcel.key is None or parcel.losses
            bundles.setdefault(id(parcel) if alone else (parcel.key,), []).append(parcel)
        for bundle in bundles.values():
            for start in range(0, len(bundle), self._most):
                self._start(bundle[start : start + self._most])

    def _start(self, parcels: list[_Parcel]) -> None:
        task = asyncio.get_running_loop().create_task(self._carry(parcels))
        self._calls.add(task)
        task.add_done_callback(self._ended)

        def give_up(_: "asyncio.Future[Any]") -> None:
            if all(parcel.future.cancelled() for parcel in parcels):
                task.cancel()

        for parcel in parcels:
            parcel.future.add_done_callback(give_up)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._calls.discard(task)
        if self._waiting:
            self._dispatch()

    async def _carry(self, parcels: list[_Parcel]) -> None:
        reply = self._call([parcel.item for parcel in parcels])
        error: Exception | None = None
        try:
            async for answers in reply:
                for index, answer in answers:
                    parcels[index].settle(answer)
        except asyncio.CancelledError:
            reply.cancel()
            raise
        except Exception as problem:  # noqa: BLE001  it belongs to whoever waits
            error = problem
        left = [parcel for parcel in parcels if not parcel.future.done()]
        if not left:
            return
        told = self._told(error)
        for parcel in left:
            if told is None:
                self._lost(parcel, error)
            else:
                parcel.settle(told)

    def _told(self, error: Exception | None) -> LorasegError | None:
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

    def _lost(self, parcel: _Parcel, error: Exception | None) -> None:
        """Send it again, to another replica."""
        parcel.losses += 1
        loop, left_s = asyncio.get_running_loop(), parcel.deadline - time.time()
        pause_s = _PAUSE_S * (parcel.losses - 1)
        logger.warning("a replica of %s was lost: %s", self._name, type(error).__name__)
        if parcel.losses >= _MOST_LOSSES or left_s <= pause_s + _LAST_WORDS_S:
            parcel.settle(self._loss())
            return
        last = loop.call_later(left_s - _LAST_WORDS_S, lambda: parcel.settle(self._loss()))
        parcel.future.add_done_callback(lambda _: last.cancel())
        loop.call_later(pause_s, self._start, [parcel])

    def _loss(self) -> ServiceError:
        return ServiceError(
            "replica_lost",
            f"the replica of {self._name} that worked on the request was lost",
            retry_after_s=2.0,
        )
