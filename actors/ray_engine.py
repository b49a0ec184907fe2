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

from actors.carrier import Carrier
from loraseg.engine.retrieval import Ask, Picked
from loraseg.engine.segmenting import Segmented, Task
from loraseg.errors import LorasegError, ServiceError
from loraseg.serving.conduct import conduct
from loraseg.serving.config import ServiceConfig
from loraseg.serving.orders import CatalogView, Order, Outcome, Readiness
from loraseg.tensor_types import ndarray

__all__ = ["Pixels", "RayEngine", "order_limit"]

ResultT = TypeVar("ResultT")

# Larger images lie in the object store, where both stages read the same copy. Ray would put them
# there for each call; smaller ones travel inside the message.
_IN_MESSAGE_BYTES = 64 * 1024
# Beyond this size a hop costs nothing beside the model, and the memory of a bundle adds up.
_BUNDLED_BYTES = 512 * 1024
_LINGER_S = 0.010
_CONTROL_S = 10.0
_REFRESH_S = 60.0
_NO_PIXELS: ndarray = np.zeros((1, 1, 3), np.uint8)

# An image, or where it lies.
Pixels = Any


def order_limit(config: ServiceConfig) -> int:
    """Return how many images one gateway takes in: those that wait, and those in the models."""
    return config.limits.queued + config.batch * config.segmenter.max_replicas


class RayEngine:
    """Segments on a cluster, see :class:`~loraseg.serving.orders.Engine`."""

    def __init__(
        self,
        config: ServiceConfig,
        retrieval: DeploymentHandle,
        segmenter: DeploymentHandle,
        *,
        on_done: Callable[[Order, Outcome], None] | None = None,
    ) -> None:
        """Use two deployments.

        Args:
            config: The service's.
            retrieval: Of :class:`~actors.replicas.Retrieval`.
            segmenter: Of :class:`~actors.replicas.Segmenter`.
            on_done: Told about each order that was carried out, for metrics.
        """
        self._config, self._retrieval, self._segmenter = config, retrieval, segmenter
        self._on_done = on_done
        self._limit, self._under_way = order_limit(config), 0
        choose: Any = retrieval.options(method_name="choose", stream=True)
        segment: Any = segmenter.options(method_name="segment", stream=True)
        self._choosing: Carrier[tuple[Ask, Pixels], Picked] = Carrier(
            choose.remote, name="retrieval", most=config.batch, linger_s=_LINGER_S
        )
        self._segmenting: Carrier[tuple[Task, Pixels], Segmented] = Carrier(
            segment.remote, name="segmenter", most=config.batch, linger_s=_LINGER_S
        )

    @property
    def under_way(self) -> int:
        """How many images are in work."""
        return self._under_way

    async def segment(self, order: Order) -> Outcome:
        """Segment one image.

        Raises:
            ServiceError: ``overloaded``, ``replica_lost``, or as
                :func:`~loraseg.serving.conduct.conduct`.
        """
        if self._under_way >= self._limit:
            raise ServiceError(
                "overloaded", f"{self._limit} images are waiting already", retry_after_s=1.0
            )
        self._under_way += 1
        try:
            outcome = await self._conduct(order)
        finally:
            self._under_way -= 1
        if self._on_done is not None:
            self._on_done(order, outcome)
        return outcome

    async def _conduct(self, order: Order) -> Outcome:
        size_bytes = order.image.nbytes
        pixels = order.image if size_bytes <= _IN_MESSAGE_BYTES else ray.put(order.image)
        is_bundled = size_bytes <= _BUNDLED_BYTES and order.tiling != "always"

        async def retrieve(ask: Ask) -> Picked:
            # A store that fails concerns whoever needs it; nobody else waits in the same call.
            parcel = replace(ask, image=_NO_PIXELS), pixels
            key = "any" if is_bundled else None
            return await self._choosing.send(parcel, key=key, deadline=order.deadline)

        async def segment(task: Task) -> Segmented:
            parcel = replace(task, image=_NO_PIXELS), pixels
            key = task.classes if is_bundled else None
            return await self._segmenting.send(parcel, key=key, deadline=order.deadline)

        libraries = self._config.libraries
        return await conduct(order, libraries=libraries, retrieve=retrieve, segment=segment)

    async def catalog(self, library: str) -> CatalogView:
        """Return a library's state."""
        return await _asked(self._retrieval.catalog.remote(library), _CONTROL_S)

    async def card(self, library: str, name: str) -> dict[str, Any]:
        """Return the card of the version in use."""
        return await _asked(self._retrieval.card.remote(library, name), _CONTROL_S)

    async def refresh(self, library: str) -> CatalogView:
        """Let all replicas look for a newer generation now."""
        handle: Any = self._retrieval
        found = await _asked(
            handle.broadcast("refresh", library).results_async(timeout_s=_REFRESH_S), _REFRESH_S
        )
        views = [view for view in found if isinstance(view, CatalogView)]
        if not views:
            raise _unreachable()
        return min(views, key=lambda view: view.generation)

    async def base(self) -> dict[str, Any]:
        """Return what is frozen."""
        segmenter, encoder = await asyncio.gather(
            _asked(self._segmenter.base.remote(), _CONTROL_S),
            _asked(self._retrieval.encoder.remote(), _CONTROL_S),
        )
        return {**segmenter, **encoder}

    async def readiness(self) -> Readiness:
        """Tell whether replicas of both stages answer, and have their models and catalogs."""
        missing, is_up = await asyncio.gather(
            _asked(self._retrieval.missing.remote(), _CONTROL_S),
            _asked(self._segmenter.is_up.remote(), _CONTROL_S),
            return_exceptions=True,
        )
        waiting = ["retrieval"] if isinstance(missing, BaseException) else list(missing)
        if is_up is not True:
            waiting.append("segmenter")
        return Readiness(not waiting, tuple(waiting))


async def _asked(response: Awaitable[ResultT], patience_s: float) -> ResultT:
    """Await a control call; an error of the replica comes out as it was raised there."""
    try:
        async with asyncio.timeout(patience_s):
            return await response
    except RayTaskError as error:
        if isinstance(error.cause, LorasegError):
            raise error.cause from None
        raise
    except (TimeoutError, RayError, RayServeException) as error:
        raise _unreachable() from error


def _unreachable() -> ServiceError:
    return ServiceError("not_ready", "no replica answers at this moment", retry_after_s=2.0)
