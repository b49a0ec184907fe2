"""The engine in one process: the models' threads beside the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from loraseg.errors import LorasegError, ServiceError
from loraseg.inference.batcher import MicroBatcher
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.retrieval import RetrievalStage
from loraseg.inference.segmentation import SegmentationStage
from loraseg.inference.selection import AdapterSelection
from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import CatalogView, Readiness
from loraseg.serving.orchestrator import run_request
from loraseg.serving.views import base_view, card_view, catalog_view, encoder_view, not_ready_reason

__all__ = ["LocalEngine"]


class LocalEngine:
    """Segments in this process, see :class:`~loraseg.serving.engine.Engine`.

    Images are embedded in one thread and segmented in another, adapters loaded in many.
    """

    def __init__(
        self, config: ServiceConfig, retrieval: RetrievalStage, stage: SegmentationStage
    ) -> None:
        """Start the threads; the stages are closed with the engine."""
        self._config, self._retrieval, self._stage = config, retrieval, stage
        self._limit, self._in_flight = config.limits.queued + config.batch, 0
        self._batcher = MicroBatcher(
            stage,
            max_batch_size=config.batch,
            max_wait_s=config.batch_wait_s,
            max_in_flight=self._limit,
        )
        self._embedding_thread = ThreadPoolExecutor(1, thread_name_prefix="embed")

    @property
    def stage(self) -> SegmentationStage:
        """The second stage, for its figures."""
        return self._stage

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait for the libraries; return whether all are loaded. Not from the event loop."""
        return all(live.wait(timeout_s) for live in self._retrieval.libraries.values())

    async def segment(self, request: SegmentRequest) -> SegmentResult:
        """Segment one image.

        Raises:
            ServiceError: ``overloaded``, or as :func:`~loraseg.serving.orchestrator.conduct`.
        """
        if self._in_flight >= self._limit:
            raise ServiceError(
                "overloaded", f"{self._limit} images are waiting already", retry_after_s=1.0
            )
        self._in_flight += 1
        try:
            libraries = self._retrieval.libraries
            return await run_request(
                request, libraries=libraries, retrieve=self._retrieve, segment=self._segment
            )
        finally:
            self._in_flight -= 1

    async def catalog(self, library: str) -> CatalogView:
        """Return a library's state."""
        return await asyncio.to_thread(catalog_view, self._retrieval.library(library))

    async def card(self, library: str, name: str) -> dict[str, Any]:
        """Return the card of the version in use."""
        return card_view(self._retrieval.library(library), name)

    async def refresh(self, library: str) -> CatalogView:
        """Look for a newer generation now."""
        live = self._retrieval.library(library)
        await asyncio.to_thread(live.refresh)
        return await self.catalog(library)

    async def base(self) -> dict[str, Any]:
        """Return what is frozen."""
        segmenter = base_view(self._config, self._stage)
        return {**segmenter, **encoder_view(self._config, self._retrieval)}

    async def readiness(self) -> Readiness:
        """Tell whether the catalogs are loaded; the models were, before there was an engine."""
        waiting = [not_ready_reason(live.status()) for live in self._retrieval.libraries.values()]
        missing = tuple(words for words in waiting if words is not None)
        return Readiness(not missing, missing)

    def close(self) -> None:
        """Refuse what waits, finish what is in the model, end the threads."""
        self._retrieval.close()
        self._embedding_thread.shutdown(wait=False, cancel_futures=True)
        self._batcher.close()

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _retrieve(self, request: SegmentRequest) -> AdapterSelection:
        loop = asyncio.get_running_loop()
        [picked] = await loop.run_in_executor(
            self._embedding_thread, self._retrieval.retrieve, [request]
        )
        if isinstance(picked, LorasegError):
            raise picked
        return picked

    async def _segment(self, request: SegmentRequest) -> SegmentResult:
        return await asyncio.wrap_future(self._batcher.submit(request))
