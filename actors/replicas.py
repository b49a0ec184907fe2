"""The deployments of the endpoint, each a thin shell around a stage of ``loraseg``."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ray import ObjectRef
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from actors.carrier import Answers
from actors.doorman import Door, Doorman
from actors.ray_engine import Pixels, RayEngine, order_limit
from actors.resources import StoreAccess
from actors.service_logs import join_serve_logs
from actors.service_metrics import CacheMeter, CatalogMeter, OrderMeter, RequestMeter
from loraseg.engine.lane import Lane
from loraseg.engine.retrieval import Ask, Picked
from loraseg.engine.segmenting import Segmented, Task
from loraseg.errors import LorasegError, StageError
from loraseg.segment.choice import Choice
from loraseg.serving.api import build_api
from loraseg.serving.build import build_retrieval, build_segment
from loraseg.serving.config import Replicas, ServiceConfig
from loraseg.serving.orders import CatalogView
from loraseg.serving.tokens import TokenBook
from loraseg.serving.views import base_view, card_view, catalog_view, encoder_view, waiting_for

__all__ = ["Gateway", "Retrieval", "Segmenter"]

logger = logging.getLogger(__name__)

# Answers that come almost together travel together.
_GATHER_S = 0.001
_WARM_UP_S = 600.0


class Gateway:
    """HTTP: checks, decoding and encoding of images."""

    def __init__(
        self,
        config: ServiceConfig,
        access: StoreAccess,
        retrieval: DeploymentHandle,
        segmenter: DeploymentHandle,
    ) -> None:
        _prepare(config.gateway, access)
        self._config, self._handles = config, (retrieval, segmenter)
        self._door = Door()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Build the API in the replica: it holds what does not travel between processes."""
        config = self._config
        tokens = TokenBook.open(config.tokens) if config.tokens else None
        engine = RayEngine(config, *self._handles, on_done=OrderMeter().count)
        api = build_api(
            engine, config, tokens=tokens, on_done=RequestMeter().count, writes_id=False
        )
        # Outermost, but the API stays what Serve sees: it reads the routes for its own figures.
        api.add_middleware(Doorman, door=self._door)
        return api

    async def drain(self) -> int:
        """Refuse new requests from now on; return how many are still in work."""
        self._door.is_closed = True
        return self._door.in_work


class Retrieval:
    """Embedding and search; follows the libraries."""

    def __init__(self, config: ServiceConfig, access: StoreAccess) -> None:
        _prepare(config.retrieval, access)
        self._config = config
        self._stage = build_retrieval(config)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._busy_since: float | None = None
        self._meter = CatalogMeter(self._stage.libraries)

    async def choose(self, parcels: Sequence[tuple[Ask, Pixels]]) -> AsyncGenerator[Answers, None]:
        """Choose adapters for images; yields positions with :class:`Picked` or an error."""
        images = await _images([pixels for _, pixels in parcels])
        asks = [replace(ask, image=img) for (ask, _), img in zip(parcels, images, strict=True)]
        loop = asyncio.get_running_loop()
        yield list(enumerate(await loop.run_in_executor(self._thread, self._choose, asks)))

    def _choose(self, asks: Sequence[Ask]) -> Sequence[Picked | LorasegError]:
        self._busy_since = time.monotonic()
        try:
            return self._stage.choose(asks)
        except Exception as error:
            logger.exception("%d images could not be embedded", len(asks))
            return [StageError(f"retrieval failed: {type(error).__name__}")] * len(asks)
        finally:
            self._busy_since = None

    async def catalog(self, library: str) -> CatalogView:
        """Return a library's state."""
        return await asyncio.to_thread(catalog_view, self._stage.library(library))

    async def card(self, library: str, name: str) -> dict[str, Any]:
        """Return the card of the version in use."""
        return card_view(self._stage.library(library), name)

    async def refresh(self, library: str) -> CatalogView:
        """Look for a newer generation now."""
        await asyncio.to_thread(self._stage.library(library).refresh)
        return await self.catalog(library)

    async def encoder(self) -> dict[str, Any]:
        """Return what is frozen here."""
        return encoder_view(self._config, self._stage)

    async def missing(self) -> tuple[str, ...]:
        """Return what its libraries lack."""
        waiting = [waiting_for(live.status()) for live in self._stage.libraries.values()]
        return tuple(words for words in waiting if words is not None)

    async def check_health(self) -> None:
        """Fail if the embedding is stuck. A store that is down is no reason to restart."""
        since = self._busy_since
        _check_moving("embedding", 0.0 if since is None else time.monotonic() - since, self._config)

    async def __del__(self) -> None:
        """End the threads."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._stage.close()


class Segmenter:
    """The model."""

    def __init__(self, config: ServiceConfig, access: StoreAccess) -> None:
        _prepare(config.segmenter, access)
        self._config = config
        self._stage = build_segment(config)
        self._lane = Lane(
            self._stage,
            batch=config.batch,
            wait_s=config.batch_wait_s,
            # The gateways bound what waits; all together they must find room.
            limit=order_limit(config) * config.gateway.max_replicas,
        )
        # A replica counts as up once an image went through the model.
        blank: Any = np.zeros((64, 64, 3), np.uint8)
        task = Task(image=blank, classes=("scene",), choice=Choice("base"))
        self._lane.submit(task).result(timeout=_WARM_UP_S)
        self._meter = CacheMeter(self._stage.cache, self._lane)

    async def segment(
        self, parcels: Sequence[tuple[Task, Pixels]]
    ) -> AsyncGenerator[Answers, None]:
        """Segment images; yields positions with :class:`Segmented` or an error, as they finish."""
        images = await _images([pixels for _, pixels in parcels])
        running: dict[asyncio.Future[Any], int] = {}
        for index, ((task, _), image) in enumerate(zip(parcels, images, strict=True)):
            running[asyncio.ensure_future(self._segment(replace(task, image=image)))] = index
        try:
            while running:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                if len(running) > 1:
                    await asyncio.sleep(_GATHER_S)
                done = [future for future in running if future.done()]
                yield [(running.pop(future), future.result()) for future in done]
        finally:
            for future in running:
                future.cancel()

    async def _segment(self, task: Task) -> Segmented | LorasegError:
        try:
            return await asyncio.wrap_future(self._lane.submit(task))
        except LorasegError as error:
            return error
        except Exception as error:
            logger.exception("an image could not be segmented")
            return StageError(f"segmenting failed: {type(error).__name__}")

    async def base(self) -> dict[str, Any]:
        """Return what is frozen here."""
        return await asyncio.to_thread(base_view, self._config, self._stage)

    async def is_up(self) -> bool:
        """Answer; the model has been loaded and tried."""
        return True

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell the autoscaler how many images are here: a call may bring several."""
        return {"images": float(self._lane.under_way)}

    async def check_health(self) -> None:
        """Fail if the model's thread is stuck or dead."""
        _check_moving("the model", self._lane.stuck_s, self._config)

    async def __del__(self) -> None:
        """Finish what is in the model, end the threads."""
        await asyncio.to_thread(self._lane.close)


def _prepare(placement: Replicas, access: StoreAccess) -> None:
    access.apply()
    join_serve_logs()
    torch.set_num_threads(max(1, int(placement.cpus)))


def _check_moving(what: str, stuck_s: float, config: ServiceConfig) -> None:
    # Whoever waited has given up by then; the rest of the time is for what nobody waits for.
    limit_s = 2 * config.limits.request_timeout_s
    if stuck_s > limit_s:
        raise StageError(f"{what} has not moved for {stuck_s:.0f} s, expected at most {limit_s:g}")


async def _images(pixels: Sequence[Pixels]) -> list[Any]:
    """Fetch images that lie in the object store."""
    return [await each if isinstance(each, ObjectRef) else each for each in pixels]
