"""The engine in one process: model threads next to the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from loraseg.api_types import ReadinessInfo
from loraseg.errors import LorasegError
from loraseg.inference.batcher import MicroBatcher
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.retrieval import RetrievalStage
from loraseg.inference.segmentation import SegmentationStage
from loraseg.inference.selection import AdapterSelection
from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import CatalogView, Engine
from loraseg.serving.views import base_view, card_view, catalog_view, encoder_view, not_ready_reason

__all__ = ["LocalEngine"]


class LocalEngine(Engine):
    """Segments in this process.

    One thread embeds images, one runs the segmenter, several load adapters.
    """

    def __init__(
        self, config: ServiceConfig, retrieval: RetrievalStage, stage: SegmentationStage
    ) -> None:
        """Start the threads; closing the engine closes the stages."""
        super().__init__(config, max_in_flight=config.limits.queued + config.batch)
        self._retrieval, self._stage = retrieval, stage
        self._batcher = MicroBatcher(
            stage,
            max_batch_size=config.batch,
            max_wait_s=config.batch_wait_s,
            max_in_flight=self._max_in_flight,
        )
        self._embedding_thread = ThreadPoolExecutor(1, thread_name_prefix="embed")

    @property
    def stage(self) -> SegmentationStage:
        """The segmentation stage, for its statistics."""
        return self._stage

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait for the libraries and return whether all are loaded. Not from the event loop."""
        return all(watcher.wait(timeout_s) for watcher in self._retrieval.libraries.values())

    async def catalog(self, library: str) -> CatalogView:
        """Return a library's state."""
        return await asyncio.to_thread(catalog_view, self._retrieval.library(library))

    async def card(self, library: str, name: str) -> dict[str, Any]:
        """Return the card of the version in use."""
        return card_view(self._retrieval.library(library), name)

    async def refresh(self, library: str) -> CatalogView:
        """Check for a newer generation now."""
        watcher = self._retrieval.library(library)
        await asyncio.to_thread(watcher.refresh)
        return await self.catalog(library)

    async def base(self) -> dict[str, Any]:
        """Return base model and encoder."""
        segmenter = base_view(self._config, self._stage)
        return {**segmenter, **encoder_view(self._config, self._retrieval)}

    async def readiness(self) -> ReadinessInfo:
        """Return whether the catalogs are loaded; the models are, since the engine exists."""
        watchers = self._retrieval.libraries.values()
        reasons = [not_ready_reason(watcher.status()) for watcher in watchers]
        missing = tuple(reason for reason in reasons if reason is not None)
        return ReadinessInfo(not missing, missing)

    def close(self) -> None:
        """Reject waiting requests, finish the running batch, stop the threads."""
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
        [result] = await loop.run_in_executor(
            self._embedding_thread, self._retrieval.retrieve, [request]
        )
        if isinstance(result, LorasegError):
            raise result
        return result

    async def _segment(self, request: SegmentRequest) -> SegmentResult:
        return await asyncio.wrap_future(self._batcher.submit(request))
