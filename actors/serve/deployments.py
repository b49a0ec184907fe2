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

from actors.resources import StorageCredentials
from actors.serve.batched_calls import IndexedResults
from actors.serve.drain import DrainMiddleware, DrainState
from actors.serve.engine import ImageOrRef, RayEngine, max_images_in_flight
from actors.serve.logs import attach_serve_logging
from actors.serve.metrics import AdapterCacheMetrics, CatalogMetrics, ImageMetrics, RequestMetrics
from loraseg.errors import LorasegError, StageError
from loraseg.inference.batcher import MicroBatcher
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.selection import AdapterQuery, AdapterSelection, AdaptiveSettings
from loraseg.serving.build import build_retrieval, build_segmentation
from loraseg.serving.config import ReplicaConfig, ServiceConfig
from loraseg.serving.engine import CatalogView
from loraseg.serving.http_api.app import build_api
from loraseg.serving.tokens import TokenStore
from loraseg.serving.views import base_view, card_view, catalog_view, encoder_view, not_ready_reason

__all__ = ["Gateway", "Retrieval", "Segmenter"]

logger = logging.getLogger(__name__)

# Answers that come almost together travel together.
_RESULT_BATCH_WAIT_S = 0.001
_WARM_UP_TIMEOUT_S = 600.0


class Gateway:
    """HTTP: checks, decoding and encoding of images."""

    def __init__(
        self,
        config: ServiceConfig,
        access: StorageCredentials,
        retrieval: DeploymentHandle,
        segmenter: DeploymentHandle,
    ) -> None:
        _set_up_replica(config.gateway, access)
        self._config, self._handles = config, (retrieval, segmenter)
        self._drain_state = DrainState()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Build the API in the replica: it holds what does not travel between processes."""
        config = self._config
        tokens = TokenStore.open(config.tokens) if config.tokens else None
        engine = RayEngine(config, *self._handles, on_done=ImageMetrics().record)
        api = build_api(
            engine,
            config,
            tokens=tokens,
            on_complete=RequestMetrics().record,
            send_request_id=False,
        )
        # Outermost, but the API stays what Serve sees: it reads the routes for its own figures.
        api.add_middleware(DrainMiddleware, state=self._drain_state)
        return api

    async def drain(self) -> int:
        """Refuse new requests from now on; return how many are still in work."""
        self._drain_state.is_draining = True
        return self._drain_state.in_flight


class Retrieval:
    """Embedding and search; follows the libraries."""

    def __init__(self, config: ServiceConfig, access: StorageCredentials) -> None:
        _set_up_replica(config.retrieval, access)
        self._config = config
        self._stage = build_retrieval(config)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._busy_since: float | None = None
        self._metrics = CatalogMetrics(self._stage.libraries)

    async def retrieve(
        self, items: Sequence[tuple[SegmentRequest, ImageOrRef]]
    ) -> AsyncGenerator[IndexedResults, None]:
        """Choose adapters for images; yields positions with :class:`Picked` or an error."""
        images = await _fetch_images([pixels for _, pixels in items])
        asks = [replace(ask, image=img) for (ask, _), img in zip(items, images, strict=True)]
        loop = asyncio.get_running_loop()
        yield list(enumerate(await loop.run_in_executor(self._thread, self._retrieve, asks)))

    def _retrieve(
        self, requests: Sequence[SegmentRequest]
    ) -> Sequence[AdapterSelection | LorasegError]:
        self._busy_since = time.monotonic()
        try:
            return self._stage.retrieve(requests)
        except Exception as error:
            logger.exception("%d images could not be embedded", len(requests))
            return [StageError(f"retrieval failed: {type(error).__name__}")] * len(requests)
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

    async def pending_libraries(self) -> tuple[str, ...]:
        """Return what its libraries lack."""
        waiting = [not_ready_reason(live.status()) for live in self._stage.libraries.values()]
        return tuple(words for words in waiting if words is not None)

    async def check_health(self) -> None:
        """Fail if the embedding is stuck. A store that is down is no reason to restart."""
        since = self._busy_since
        _check_stalled(
            "embedding", 0.0 if since is None else time.monotonic() - since, self._config
        )

    async def __del__(self) -> None:
        """End the threads."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._stage.close()


class Segmenter:
    """The model."""

    def __init__(self, config: ServiceConfig, access: StorageCredentials) -> None:
        _set_up_replica(config.segmenter, access)
        self._config = config
        self._stage = build_segmentation(config)
        self._batcher = MicroBatcher(
            self._stage,
            max_batch_size=config.batch,
            max_wait_s=config.batch_wait_s,
            # The gateways bound what waits; all together they must find room.
            max_in_flight=max_images_in_flight(config) * config.gateway.max_replicas,
        )
        bare = AdapterQuery(settings=AdaptiveSettings(mode="base"))
        # A replica counts as up once an image went through the model.
        blank: Any = np.zeros((64, 64, 3), np.uint8)
        task = SegmentRequest(image=blank, classes=("scene",), query=bare)
        self._batcher.submit(task).result(timeout=_WARM_UP_TIMEOUT_S)
        self._metrics = AdapterCacheMetrics(self._stage.cache, self._batcher)

    async def segment(
        self, items: Sequence[tuple[SegmentRequest, ImageOrRef]]
    ) -> AsyncGenerator[IndexedResults, None]:
        """Segment images; yields positions with :class:`Segmented` or an error, as they finish."""
        images = await _fetch_images([pixels for _, pixels in items])
        running: dict[asyncio.Future[Any], int] = {}
        for index, ((task, _), image) in enumerate(zip(items, images, strict=True)):
            running[asyncio.ensure_future(self._segment(replace(task, image=image)))] = index
        try:
            while running:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                if len(running) > 1:
                    await asyncio.sleep(_RESULT_BATCH_WAIT_S)
                done = [future for future in running if future.done()]
                yield [(running.pop(future), future.result()) for future in done]
        finally:
            for future in running:
                future.cancel()

    async def _segment(self, task: SegmentRequest) -> SegmentResult | LorasegError:
        try:
            return await asyncio.wrap_future(self._batcher.submit(task))
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
        return {"images": float(self._batcher.in_flight)}

    async def check_health(self) -> None:
        """Fail if the model's thread is stuck or dead."""
        _check_stalled("the model", self._batcher.stalled_s, self._config)

    async def __del__(self) -> None:
        """Finish what is in the model, end the threads."""
        await asyncio.to_thread(self._batcher.close)


def _set_up_replica(replicas: ReplicaConfig, access: StorageCredentials) -> None:
    access.export()
    attach_serve_logging()
    torch.set_num_threads(max(1, int(replicas.cpus)))


def _check_stalled(what: str, stalled_s: float, config: ServiceConfig) -> None:
    # Whoever waited has given up by then; the rest of the time is for what nobody waits for.
    limit_s = 2 * config.limits.request_timeout_s
    if stalled_s > limit_s:
        raise StageError(
            f"{what} has not moved for {stalled_s:.0f} s, expected at most {limit_s:g}"
        )


async def _fetch_images(pixels: Sequence[ImageOrRef]) -> list[Any]:
    """Fetch images that lie in the object store."""
    return [await each if isinstance(each, ObjectRef) else each for each in pixels]
