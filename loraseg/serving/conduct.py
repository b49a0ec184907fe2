"""How an order becomes an outcome: choose adapters, segment, choose again if some do not load."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping

from loraseg.engine.adapter_ref import AdapterUnavailableError, Failure
from loraseg.engine.retrieval import Ask, Picked
from loraseg.engine.segmenting import Segmented, Task
from loraseg.errors import AdapterNotFoundError, ServiceError
from loraseg.segment.choice import Choice
from loraseg.serving.orders import Order, Outcome, Skipped

__all__ = ["conduct"]

_ROUNDS = 3
_AGAIN_S = 5.0

Retrieve = Callable[[Ask], Awaitable[Picked]]
Segment = Callable[[Task], Awaitable[Segmented]]


async def conduct(
    order: Order, *, libraries: Collection[str], retrieve: Retrieve, segment: Segment
) -> Outcome:
    """Carry out an order. Cancelling cancels the stage that is at work.

    Args:
        order: One image.
        libraries: The names that there are.
        retrieve: The first stage, see :class:`~loraseg.engine.retrieval.RetrievalStage`; raises
            what that returns as an error.
        segment: The second, see :class:`~loraseg.engine.segmenting.SegmentStage`.

    Raises:
        ServiceError: ``no_such_library``, ``no_such_adapter``, ``deadline``,
            ``adapters_unavailable``, and what the stages raise.
    """
    if order.library not in libraries:
        known = ", ".join(repr(name) for name in libraries)
        raise ServiceError("no_such_library", f"no library {order.library!r}; there are {known}")
    limit = asyncio.timeout(order.deadline - time.time())
    try:
        async with limit:
            return await _rounds(order, retrieve, segment)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise ServiceError("deadline", "the time for the request is over") from error
    except AdapterNotFoundError as error:
        raise ServiceError("no_such_adapter", str(error)) from error


async def _rounds(order: Order, retrieve: Retrieve, segment: Segment) -> Outcome:
    started = time.perf_counter()
    spent: Counter[str] = Counter()
    failed: tuple[Failure, ...] = ()
    for _ in range(_ROUNDS):
        picked = await _picked(order, failed, retrieve)
        spent.update(picked.timing_ms)
        task = Task(
            image=order.image,
            classes=order.classes,
            choice=picked.choice,
            attention=picked.attention,
            maps=frozenset(order.maps),
            tiling=order.tiling,
            deadline=order.deadline,
        )
        try:
            done = await segment(task)
        except AdapterUnavailableError as error:
            # All of them every time: another replica may answer, which has not heard of them.
            failed += error.failures
            continue
        spent.update(done.timing_ms)
        return Outcome(
            result=done.result,
            generation=picked.generation,
            skipped=tuple(Skipped(f.name, f.version, f.digest, f.reason) for f in picked.skipped),
            timing_ms=_with_queue(spent, (time.perf_counter() - started) * 1000),
            batch=done.batch,
        )
    raise ServiceError(
        "adapters_unavailable",
        f"{len(failed)} of the chosen adapters could not be loaded",
        retry_after_s=_AGAIN_S,
    )


async def _picked(order: Order, failed: tuple[Failure, ...], retrieve: Retrieve) -> Picked:
    if order.wish.settings.mode == "base":
        return Picked(choice=Choice("base"))
    ask = Ask(
        image=order.image,
        library=order.library,
        wish=order.wish,
        visible=order.visible,
        failed=failed,
    )
    return await retrieve(ask)


def _with_queue(spent: Mapping[str, float], total_ms: float) -> dict[str, float]:
    """Add what is neither work nor loading: waiting, and hops between the stages."""
    stages = {name: spent.get(name, 0.0) for name in ("embed", "retrieve", "load", "segment")}
    return {**stages, "queue": max(0.0, total_ms - sum(stages.values()))}
