"""The deployments of the endpoint; each wraps a stage of ``loraseg``."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from actors.resources import StorageCredentials
from actors.serve.batched_calls import IndexedResults
from actors.serve.drain import DrainMiddleware, DrainState
from actors.serve.engine import RayEngine, fetch_images, max_images_in_flight
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

# Results that finish within this time are sent together.
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
        """Build the API in the replica, since it cannot be pickled."""
        config = self._config
        tokens = TokenStore.open(config.tokens) if config.tokens else None
        engine = RayEngine(config, *self._handles, on_complete=ImageMetrics().record)
        api = build_api(
            engine,
            config,
            tokens=tokens,
            on_complete=RequestMetrics().record,
            send_request_id=False,
        )
        # Added to the API, not wrapped around it: Serve reads the routes of the app it gets.
        api.add_middleware(DrainMiddleware, state=self._drain_state)
        return api

    async def drain(self) -> int:
        """Reject new requests from now on; return the number of running ones."""
        self._drain_state.is_draining = True
        return self._drain_state.in_flight


class Retrieval:
    """Embeds images and searches the libraries, whose catalogs it follows."""

    def __init__(self, config: ServiceConfig, access: StorageCredentials) -> None:
        _set_up_replica(config.retrieval, access)
        self._config = config
        self._stage = build_retrieval(config)
        # Half a batch: a model that runs two halves takes 3 % longer than with the whole batch.
        half = max(1, config.batch // 2)
        self._chunk_size = config.batch if self._stage.embeds_together else half
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._busy_since: float | None = None
        self._metrics = CatalogMetrics(self._stage.libraries)

    async def retrieve(
        self, requests: Sequence[SegmentRequest]
    ) -> AsyncGenerator[IndexedResults, None]:
        """Yield indices of requests with their selection or error, in chunks.

        While the segmenter runs the first chunk of a call, the next one is embedded.
        """
        loop = asyncio.get_running_loop()
        fetched = await fetch_images(requests)
        for start in range(0, len(fetched), self._chunk_size):
            chunk = fetched[start : start + self._chunk_size]
            results = await loop.run_in_executor(self._thread, self._retrieve, chunk)
            yield list(enumerate(results, start))

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
        """Check for a newer generation now."""
        await asyncio.to_thread(self._stage.library(library).refresh)
        return await self.catalog(library)

    async def encoder(self) -> dict[str, Any]:
        """Return the description of the encoder."""
        return encoder_view(self._config, self._stage)

    async def pending_libraries(self) -> tuple[str, ...]:
        """Return for each library that is not loaded its name and the reason."""
        watchers = self._stage.libraries.values()
        reasons = [not_ready_reason(watcher.status()) for watcher in watchers]
        return tuple(reason for reason in reasons if reason is not None)

    async def check_health(self) -> None:
        """Raise if the embedding is stuck. An unreachable store is not a reason to restart."""
        since = self._busy_since
        stalled_s = 0.0 if since is None else time.monotonic() - since
        _check_stalled("embedding", stalled_s, self._config)

    async def __del__(self) -> None:
        """Stop the threads."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._stage.close()


class Segmenter:
    """Runs the segmentation model."""

    def __init__(self, config: ServiceConfig, access: StorageCredentials) -> None:
        _set_up_replica(config.segmenter, access)
        self._config = config
        self._stage = build_segmentation(config)
        self._batcher = MicroBatcher(
            self._stage,
            max_batch_size=config.batch,
            max_wait_s=config.batch_wait_s,
            # Each gateway limits its images; the replica accepts those of all of them.
            max_in_flight=max_images_in_flight(config) * config.gateway.max_replicas,
        )
        bare = AdapterQuery(settings=AdaptiveSettings(mode="base"))
        # Warm up: Serve routes requests to the replica when the constructor returns.
        blank: Any = np.zeros((64, 64, 3), np.uint8)
        request = SegmentRequest(image=blank, classes=("scene",), query=bare)
        self._batcher.submit(request).result(timeout=_WARM_UP_TIMEOUT_S)
        self._metrics = AdapterCacheMetrics(self._stage.cache, self._batcher)

    async def segment(
        self, requests: Sequence[SegmentRequest]
    ) -> AsyncGenerator[IndexedResults, None]:
        """Yield indices of requests with their result or error, in the order of completion."""
        running: dict[asyncio.Future[Any], int] = {
            asyncio.ensure_future(self._segment(request)): index
            for index, request in enumerate(await fetch_images(requests))
        }
        try:
            while running:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                if not all(future.done() for future in running):
                    await asyncio.sleep(_RESULT_BATCH_WAIT_S)
                done = [future for future in running if future.done()]
                yield [(running.pop(future), future.result()) for future in done]
        finally:
            for future in running:
                future.cancel()

    async def _segment(self, request: SegmentRequest) -> SegmentResult | LorasegError:
        try:
            return await asyncio.wrap_future(self._batcher.submit(request))
        except LorasegError as error:
            return error
        except Exception as error:
            logger.exception("an image could not be segmented")
            return StageError(f"segmentation failed: {type(error).__name__}")

    async def base(self) -> dict[str, Any]:
        """Return the description of the base model."""
        return await asyncio.to_thread(base_view, self._config, self._stage)

    async def is_up(self) -> bool:
        """Return True: the constructor has loaded and run the model."""
        return True

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the number of images for the autoscaler: a call may have several."""
        return {"images": float(self._batcher.in_flight)}

    async def check_health(self) -> None:
        """Raise if the model's thread is stuck or dead."""
        _check_stalled("the model", self._batcher.stalled_s, self._config)

    async def __del__(self) -> None:
        """Finish the running batch and stop the threads."""
        await asyncio.to_thread(self._batcher.close)


def _set_up_replica(replicas: ReplicaConfig, access: StorageCredentials) -> None:
    access.export()
    attach_serve_logging()
    torch.set_num_threads(max(1, int(replicas.cpus)))


def _check_stalled(component: str, stalled_s: float, config: ServiceConfig) -> None:
    # Work on an image may continue after the timeout of its request.
    limit_s = 2 * config.limits.request_timeout_s
    if stalled_s > limit_s:
        raise StageError(
            f"{component} has made no progress for {stalled_s:.0f} s, expected at most {limit_s:g}"
        )
