"""How an order becomes an outcome: choose adapters, segment, choose again if some do not load."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace

from loraseg.errors import AdapterNotFoundError, ServiceError
from loraseg.inference.adapter_ref import AdapterUnavailableError
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.selection import AdapterSelection

__all__ = ["run_request"]

_MAX_ATTEMPTS = 3
_RETRY_AFTER_S = 5.0

RetrieveFunction = Callable[[SegmentRequest], Awaitable[AdapterSelection]]
SegmentFunction = Callable[[SegmentRequest], Awaitable[SegmentResult]]


async def run_request(
    request: SegmentRequest,
    *,
    libraries: Collection[str],
    retrieve: RetrieveFunction,
    segment: SegmentFunction,
) -> SegmentResult:
    """Carry out an order. Cancelling cancels the stage that is at work.

    Args:
        request: One image.
        libraries: The names that there are.
        retrieve: The first stage, see :class:`~loraseg.inference.retrieval.RetrievalStage`; raises
            what that returns as an error.
        segment: The second, see :class:`~loraseg.inference.segmentation.SegmentationStage`.

    Raises:
        ServiceError: ``no_such_library``, ``no_such_adapter``, ``deadline``,
            ``adapters_unavailable``, and what the stages raise.
    """
    if request.library not in libraries:
        known = ", ".join(repr(name) for name in libraries)
        raise ServiceError("no_such_library", f"no library {request.library!r}; there are {known}")
    limit = asyncio.timeout(request.deadline - time.time())
    try:
        async with limit:
            return await _run_attempts(request, retrieve, segment)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise ServiceError("deadline", "the time for the request is over") from error
    except AdapterNotFoundError as error:
        raise ServiceError("no_such_adapter", str(error)) from error


async def _run_attempts(
    request: SegmentRequest, retrieve: RetrieveFunction, segment: SegmentFunction
) -> SegmentResult:
    started = time.perf_counter()
    spent: Counter[str] = Counter()
    for _ in range(_MAX_ATTEMPTS):
        selection = AdapterSelection("base")
        if request.query.settings.mode != "base":
            selection = await retrieve(request)
        try:
            result = await segment(replace(request, selection=selection))
        except AdapterUnavailableError as error:
            # All of them every time: another retrieval replica may answer the next attempt.
            request = replace(request, failed=request.failed + error.failures)
            spent.update(selection.timing_ms)
            continue
        spent.update(result.timing_ms)
        total_ms = (time.perf_counter() - started) * 1000
        return replace(result, timing_ms=_add_queue_time(spent, total_ms))
    raise ServiceError(
        "adapters_unavailable",
        f"{len(request.failed)} of the chosen adapters could not be loaded",
        retry_after_s=_RETRY_AFTER_S,
    )


def _add_queue_time(timing_ms: Mapping[str, float], total_ms: float) -> dict[str, float]:
    """Add what is neither work nor loading: waiting, and hops between the stages."""
    stages = {name: timing_ms.get(name, 0.0) for name in ("embed", "retrieve", "load", "segment")}
    return {**stages, "queue": max(0.0, total_ms - sum(stages.values()))}
