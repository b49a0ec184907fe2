"""The engine that a gateway serves: the two stages are deployments behind handles."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.serve.batched_calls import CallBatcher
from loraseg.errors import LorasegError, ServiceError
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.selection import AdapterSelection
from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import CatalogView, Readiness
from loraseg.serving.orchestrator import run_request
from loraseg.tensor_types import ndarray

__all__ = ["ImageOrRef", "RayEngine", "max_images_in_flight"]

ResultT = TypeVar("ResultT")

# Larger images lie in the object store, where both stages read the same copy. Ray would put them
# there for each call; smaller ones travel inside the message.
_MAX_INLINE_BYTES = 64 * 1024
# Beyond this size a hop costs nothing beside the model, and the memory of a bundle adds up.
_MAX_BATCHED_BYTES = 512 * 1024
_LINGER_S = 0.010
_CONTROL_TIMEOUT_S = 10.0
_REFRESH_TIMEOUT_S = 60.0
_NO_PIXELS: ndarray = np.zeros((1, 1, 3), np.uint8)

# An image, or where it lies.
ImageOrRef = Any


def max_images_in_flight(config: ServiceConfig) -> int:
    """Return how many images one gateway takes in: those that wait, and those in the models."""
    return config.limits.queued + config.batch * config.segmenter.max_replicas


class RayEngine:
    """Segments on a cluster, see :class:`~loraseg.serving.engine.Engine`."""

    def __init__(
        self,
        config: ServiceConfig,
        retrieval: DeploymentHandle,
        segmenter: DeploymentHandle,
        *,
        on_done: Callable[[SegmentRequest, SegmentResult], None] | None = None,
    ) -> None:
        """Use two deployments.

        Args:
            config: The service's.
            retrieval: Of :class:`~actors.serve.deployments.Retrieval`.
            segmenter: Of :class:`~actors.serve.deployments.Segmenter`.
            on_done: Told about each order that was carried out, for metrics.
        """
        self._config, self._retrieval, self._segmenter = config, retrieval, segmenter
        self._on_done = on_done
        self._limit, self._in_flight = max_images_in_flight(config), 0
        choose: Any = retrieval.options(method_name="retrieve", stream=True)
        segment: Any = segmenter.options(method_name="segment", stream=True)
        self._retrieval_calls: CallBatcher[tuple[SegmentRequest, ImageOrRef], AdapterSelection] = (
            CallBatcher(
                choose.remote, name="retrieval", max_batch_size=config.batch, linger_s=_LINGER_S
            )
        )
        self._segment_calls: CallBatcher[tuple[SegmentRequest, ImageOrRef], SegmentResult] = (
            CallBatcher(
                segment.remote, name="segmenter", max_batch_size=config.batch, linger_s=_LINGER_S
            )
        )

    @property
    def in_flight(self) -> int:
        """How many images are in work."""
        return self._in_flight

    async def segment(self, request: SegmentRequest) -> SegmentResult:
        """Segment one image.

        Raises:
            ServiceError: ``overloaded``, ``replica_lost``, or as
                :func:`~loraseg.serving.orchestrator.conduct`.
        """
        if self._in_flight >= self._limit:
            raise ServiceError(
                "overloaded", f"{self._limit} images are waiting already", retry_after_s=1.0
            )
        self._in_flight += 1
        try:
            outcome = await self._run_request(request)
        finally:
            self._in_flight -= 1
        if self._on_done is not None:
            self._on_done(request, outcome)
        return outcome

    async def _run_request(self, request: SegmentRequest) -> SegmentResult:
        size_bytes = request.image.nbytes
        pixels = request.image if size_bytes <= _MAX_INLINE_BYTES else ray.put(request.image)
        is_bundled = size_bytes <= _MAX_BATCHED_BYTES and request.tiling != "always"

        async def retrieve(ask: SegmentRequest) -> AdapterSelection:
            # A store that fails concerns whoever needs it; nobody else waits in the same call.
            parcel = replace(ask, image=_NO_PIXELS), pixels
            key = "any" if is_bundled else None
            return await self._retrieval_calls.submit(parcel, key=key, deadline=request.deadline)

        async def segment(task: SegmentRequest) -> SegmentResult:
            parcel = replace(task, image=_NO_PIXELS), pixels
            key = task.classes if is_bundled else None
            return await self._segment_calls.submit(parcel, key=key, deadline=request.deadline)

        libraries = self._config.libraries
        return await run_request(request, libraries=libraries, retrieve=retrieve, segment=segment)

    async def catalog(self, library: str) -> CatalogView:
        """Return a library's state."""
        return await _call_replica(self._retrieval.catalog.remote(library), _CONTROL_TIMEOUT_S)

    async def card(self, library: str, name: str) -> dict[str, Any]:
        """Return the card of the version in use."""
        return await _call_replica(self._retrieval.card.remote(library, name), _CONTROL_TIMEOUT_S)

    async def refresh(self, library: str) -> CatalogView:
        """Let all replicas look for a newer generation now."""
        handle: Any = self._retrieval
        found = await _call_replica(
            handle.broadcast("refresh", library).results_async(timeout_s=_REFRESH_TIMEOUT_S),
            _REFRESH_TIMEOUT_S,
        )
        views = [view for view in found if isinstance(view, CatalogView)]
        if not views:
            raise _unreachable()
        return min(views, key=lambda view: view.generation)

    async def base(self) -> dict[str, Any]:
        """Return what is frozen."""
        segmenter, encoder = await asyncio.gather(
            _call_replica(self._segmenter.base.remote(), _CONTROL_TIMEOUT_S),
            _call_replica(self._retrieval.encoder.remote(), _CONTROL_TIMEOUT_S),
        )
        return {**segmenter, **encoder}

    async def readiness(self) -> Readiness:
        """Tell whether replicas of both stages answer, and have their models and catalogs."""
        missing, is_up = await asyncio.gather(
            _call_replica(self._retrieval.pending_libraries.remote(), _CONTROL_TIMEOUT_S),
            _call_replica(self._segmenter.is_up.remote(), _CONTROL_TIMEOUT_S),
            return_exceptions=True,
        )
        waiting = ["retrieval"] if isinstance(missing, BaseException) else list(missing)
        if is_up is not True:
            waiting.append("segmenter")
        return Readiness(not waiting, tuple(waiting))


async def _call_replica(response: Awaitable[ResultT], timeout_s: float) -> ResultT:
    """Await a control call; an error of the replica comes out as it was raised there."""
    try:
        async with asyncio.timeout(timeout_s):
            return await response
    except RayTaskError as error:
        if isinstance(error.cause, LorasegError):
            raise error.cause from None
        raise
    except (TimeoutError, RayError, RayServeException) as error:
        raise _unreachable() from error


def _unreachable() -> ServiceError:
    return ServiceError("not_ready", "no replica answers at this moment", retry_after_s=2.0)
