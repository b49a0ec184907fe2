"""The interface between the HTTP API and the models, and the steps that all engines share."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loraseg.api_types import AdapterInfo, ReadinessInfo
from loraseg.errors import AdapterNotFoundError, ServiceError
from loraseg.inference.adapter_ref import AdapterUnavailableError
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.selection import AdapterSelection
from loraseg.inference.service_errors import no_such_library_error, overloaded_error
from loraseg.serving.config import ServiceConfig

__all__ = ["CatalogView", "Engine"]

_MAX_ATTEMPTS = 3
_RETRY_AFTER_S = 5.0
_STAGES = ("embed", "retrieve", "load", "segment")


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogView:
    """State of a library in the service.

    Attributes:
        library: The service's name of it.
        generation: Catalog generation in use.
        loaded_s: Seconds since that generation was loaded.
        checked_s: Seconds since the store last confirmed that it is the newest.
        problem: Why the latest check failed, for clients; None if it did not.
        adapters: Those that fit the base, ordered by name.
        incompatible: Number of adapters that do not fit the service's base or encoder.
    """

    library: str
    generation: int
    loaded_s: float
    checked_s: float
    problem: str | None
    adapters: tuple[AdapterInfo, ...]
    incompatible: int


class Engine(ABC):
    """Segments images, in this process or on a cluster. Used from one event loop.

    All methods raise :class:`~loraseg.errors.ServiceError` for errors that concern the client
    (``not_ready``, ``overloaded``, ``deadline``, ``replica_lost``, ``no_such_library``,
    ``no_such_adapter``); any other error is a fault of the service.
    """

    def __init__(self, config: ServiceConfig, *, max_in_flight: int) -> None:
        """Accept at most ``max_in_flight`` images at a time, waiting ones included."""
        self._config = config
        self._max_in_flight = max_in_flight
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Number of images that wait or are processed."""
        return self._in_flight

    async def segment(self, request: SegmentRequest) -> SegmentResult:
        """Retrieve the adapters of an image and segment it; cancelling stops the work.

        Adapters that cannot be loaded are excluded and the retrieval is repeated.

        Raises:
            ServiceError: ``no_such_library``, ``no_such_adapter``, ``overloaded``, ``deadline``,
                ``adapters_unavailable``, and what the stages raise.
        """
        if request.library not in self._config.libraries:
            raise no_such_library_error(request.library, self._config.libraries)
        if self._in_flight >= self._max_in_flight:
            raise overloaded_error(self._max_in_flight)
        self._in_flight += 1
        try:
            return await self._retrieve_and_segment(request)
        except AdapterNotFoundError as error:
            raise ServiceError("no_such_adapter", str(error)) from error
        finally:
            self._in_flight -= 1

    async def _retrieve_and_segment(self, request: SegmentRequest) -> SegmentResult:
        started = time.perf_counter()
        timing_ms: Counter[str] = Counter()
        for _ in range(_MAX_ATTEMPTS):
            selection = AdapterSelection("base")
            if request.query.settings.mode != "base":
                selection = await self._retrieve(request)
            try:
                result = await self._segment(replace(request, selection=selection))
            except AdapterUnavailableError as error:
                # All of them every time: another retrieval replica may handle the next attempt.
                request = replace(request, failed=request.failed + error.failures)
                timing_ms.update(selection.timing_ms)
                continue
            timing_ms.update(result.timing_ms)
            total_ms = (time.perf_counter() - started) * 1000
            return replace(result, timing_ms=_with_queue_time(timing_ms, total_ms))
        raise ServiceError(
            "adapters_unavailable",
            f"{len(request.failed)} of the selected adapters could not be loaded",
            retry_after_s=_RETRY_AFTER_S,
        )

    @abstractmethod
    async def _retrieve(self, request: SegmentRequest) -> AdapterSelection:
        """Run the first stage, :meth:`loraseg.inference.retrieval.RetrievalStage.retrieve`.

        Raises:
            LorasegError: The result, if it is an error.
        """

    @abstractmethod
    async def _segment(self, request: SegmentRequest) -> SegmentResult:
        """Run the second stage, :class:`loraseg.inference.segmentation.SegmentationStage`."""

    @abstractmethod
    async def catalog(self, library: str) -> CatalogView:
        """Return a library's state."""

    @abstractmethod
    async def card(self, library: str, name: str) -> dict[str, Any]:
        """Return the card (JSON values, without centroids) of the version in use."""

    @abstractmethod
    async def refresh(self, library: str) -> CatalogView:
        """Check for a newer generation now."""

    @abstractmethod
    async def base(self) -> dict[str, Any]:
        """Return base model and encoder: names, digests, prompts, sizes, default settings."""

    @abstractmethod
    async def readiness(self) -> ReadinessInfo:
        """Return whether base model and catalogs are loaded; never raises."""


def _with_queue_time(timing_ms: Mapping[str, float], total_ms: float) -> dict[str, float]:
    """Add ``queue``: waiting and transport between the stages."""
    stages = {name: timing_ms.get(name, 0.0) for name in _STAGES}
    return {**stages, "queue": max(0.0, total_ms - sum(stages.values()))}
