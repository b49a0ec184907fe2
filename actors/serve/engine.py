"""The engine of a gateway: both stages are deployments behind handles."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.serve.batched_calls import CallBatcher
from loraseg.api_types import ReadinessInfo
from loraseg.errors import LorasegError, ServiceError
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.selection import AdapterSelection
from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import CatalogView, Engine

__all__ = ["RayEngine", "fetch_images", "max_images_in_flight"]

ResultT = TypeVar("ResultT")

# Larger images are put into the object store once for both stages; Ray would do so in each call.
_MAX_INLINE_BYTES = 64 * 1024
# For larger images the time of a call is small compared to the model's.
_MAX_BATCHED_BYTES = 512 * 1024
_LINGER_S = 0.010
_CONTROL_TIMEOUT_S = 10.0
_REFRESH_TIMEOUT_S = 60.0


def max_images_in_flight(config: ServiceConfig) -> int:
    """Return the limit of images in one gateway: waiting ones and those in the models."""
    return config.limits.queued + config.batch * config.segmenter.max_replicas


class RayEngine(Engine):
    """Segments on a Ray cluster."""

    def __init__(
        self,
        config: ServiceConfig,
        retrieval: DeploymentHandle,
        segmenter: DeploymentHandle,
        *,
        on_complete: Callable[[SegmentRequest, SegmentResult], None] | None = None,
    ) -> None:
        """Use the two deployments.

        Args:
            config: Of the service.
            retrieval: Handle of :class:`~actors.serve.deployments.Retrieval`.
            segmenter: Handle of :class:`~actors.serve.deployments.Segmenter`.
            on_complete: Called after each segmented image, for metrics.
        """
        super().__init__(config, max_in_flight=max_images_in_flight(config))
        self._retrieval, self._segmenter = retrieval, segmenter
        self._on_complete = on_complete
        retrieve: Any = retrieval.options(method_name="retrieve", stream=True)
        segment: Any = segmenter.options(method_name="segment", stream=True)
        self._retrieval_calls: CallBatcher[SegmentRequest, AdapterSelection] = CallBatcher(
            retrieve.remote,
            name="retrieval",
            # Retrieval reads catalogs from memory, so that all libraries may share a call.
            batch_key=lambda request: "any" if _is_batchable(request) else None,
            max_batch_size=config.batch,
            linger_s=_LINGER_S,
        )
        self._segment_calls: CallBatcher[SegmentRequest, SegmentResult] = CallBatcher(
            segment.remote,
            name="segmenter",
            batch_key=_segment_key,
            max_batch_size=config.batch,
            linger_s=_LINGER_S,
        )

    async def segment(self, request: SegmentRequest) -> SegmentResult:
        """Segment one image.

        Raises:
            ServiceError: As :meth:`Engine.segment`, or ``replica_lost``.
        """
        result = await super().segment(request)
        if self._on_complete is not None:
            self._on_complete(request, result)
        return result

    async def _retrieve_and_segment(self, request: SegmentRequest) -> SegmentResult:
        return await super()._retrieve_and_segment(_with_shared_image(request))

    async def _retrieve(self, request: SegmentRequest) -> AdapterSelection:
        return await self._retrieval_calls.submit(request)

    async def _segment(self, request: SegmentRequest) -> SegmentResult:
        return await self._segment_calls.submit(request)

    async def catalog(self, library: str) -> CatalogView:
        """Return a library's state."""
        return await _call_replica(self._retrieval.catalog.remote(library), _CONTROL_TIMEOUT_S)

    async def card(self, library: str, name: str) -> dict[str, Any]:
        """Return the card of the version in use."""
        return await _call_replica(self._retrieval.card.remote(library, name), _CONTROL_TIMEOUT_S)

    async def refresh(self, library: str) -> CatalogView:
        """Make all replicas check for a newer generation; return the oldest of their states."""
        handle: Any = self._retrieval
        results = await _call_replica(
            handle.broadcast("refresh", library).results_async(timeout_s=_REFRESH_TIMEOUT_S),
            _REFRESH_TIMEOUT_S,
        )
        views = [view for view in results if isinstance(view, CatalogView)]
        if not views:
            raise _unreachable()
        return min(views, key=lambda view: view.generation)

    async def base(self) -> dict[str, Any]:
        """Return base model and encoder."""
        segmenter, encoder = await asyncio.gather(
            _call_replica(self._segmenter.base.remote(), _CONTROL_TIMEOUT_S),
            _call_replica(self._retrieval.encoder.remote(), _CONTROL_TIMEOUT_S),
        )
        return {**segmenter, **encoder}

    async def readiness(self) -> ReadinessInfo:
        """Return whether replicas of both stages respond and have models and catalogs."""
        missing, is_up = await asyncio.gather(
            _call_replica(self._retrieval.pending_libraries.remote(), _CONTROL_TIMEOUT_S),
            _call_replica(self._segmenter.is_up.remote(), _CONTROL_TIMEOUT_S),
            return_exceptions=True,
        )
        waiting = ["retrieval"] if isinstance(missing, BaseException) else list(missing)
        if is_up is not True:
            waiting.append("segmenter")
        return ReadinessInfo(not waiting, tuple(waiting))


@dataclass(frozen=True, slots=True)
class _SharedImage:
    """An image in the object store, in place of the array in a request."""

    ref: ObjectRef
    nbytes: int


async def fetch_images(requests: Sequence[SegmentRequest]) -> list[SegmentRequest]:
    """Return requests with their images, fetched from the object store if they are there."""
    fetched: list[SegmentRequest] = []
    for request in requests:
        image: Any = request.image
        if isinstance(image, _SharedImage):
            request = replace(request, image=await image.ref)
        fetched.append(request)
    return fetched


def _with_shared_image(request: SegmentRequest) -> SegmentRequest:
    """Return a request that is cheap to send twice."""
    if request.image.nbytes <= _MAX_INLINE_BYTES:
        return request
    image: Any = _SharedImage(ray.put(request.image), request.image.nbytes)
    return replace(request, image=image)


def _is_batchable(request: SegmentRequest) -> bool:
    return request.image.nbytes <= _MAX_BATCHED_BYTES and request.tiling != "always"


def _segment_key(request: SegmentRequest) -> Hashable | None:
    return request.classes if _is_batchable(request) else None


async def _call_replica(response: Awaitable[ResultT], timeout_s: float) -> ResultT:
    """Await a control call; raise an error of the replica as it was raised there."""
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
    return ServiceError("not_ready", "no replica responds at present", retry_after_s=2.0)
