"""What the API asks of an engine, and what it gets back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from loraseg.inference.pipeline import Segmentation
from loraseg.inference.selection import AdapterQuery, TilingMode
from loraseg.tensor_types import ndarray

__all__ = [
    "AdapterView",
    "CatalogView",
    "Engine",
    "MapName",
    "Readiness",
    "SegmentRequest",
    "SegmentResult",
    "SkippedAdapter",
]

MapName = Literal["confidence", "entropy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRequest:
    """One image to segment.

    Attributes:
        request_id: For logs.
        image: RGB, uint8 (h, w, 3).
        classes: Distinct names; their order gives the ids of the label map.
        library: One of the service's library names.
        query: How adapters are chosen.
        visible: Name patterns (``fnmatch``) of the adapters that may be used; None for all.
        maps: Further maps to compute.
        tiling: Whether the image is cut into overlapping tiles; ``auto`` decides by its size.
        deadline: When the answer is worthless, as ``time.time()``.
    """

    request_id: str
    image: ndarray
    classes: tuple[str, ...]
    library: str
    query: AdapterQuery
    visible: tuple[str, ...] | None = None
    maps: frozenset[MapName] = field(default_factory=frozenset[MapName])
    tiling: TilingMode = "auto"
    deadline: float


@dataclass(frozen=True, slots=True)
class SkippedAdapter:
    """An adapter that is out of service at this moment, and why, in words for a client."""

    name: str
    version: int | str
    digest: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentResult:
    """What became of an order.

    Attributes:
        segmentation: Label map, further maps and explanation.
        generation: Of the library's catalog that the adapters were chosen from; None if no
            adapter was asked for.
        skipped: Visible adapters of the library that are out of service.
        timing_ms: By stage: ``embed``, ``retrieve``, ``load``, ``segment``, and ``queue`` for all
            waiting and hops between them.
        batch_size: How many images went through the model together.
    """

    segmentation: Segmentation
    generation: int | None
    skipped: tuple[SkippedAdapter, ...] = ()
    timing_ms: Mapping[str, float]
    batch_size: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterView:
    """The version of an adapter that its name points to now."""

    name: str
    version: int
    digest: str
    size_bytes: int
    classes: tuple[str, ...]
    images: int | None
    unavailable: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogView:
    """A library as the service sees it.

    Attributes:
        library: Its name in the service.
        generation: Which one is in use.
        loaded_s: Seconds since it came into use.
        checked_s: Seconds since the store last confirmed that it is the newest.
        problem: Why the latest check failed, in words for a client; None if it did not.
        adapters: Those that fit the base, ordered by name.
        incompatible: Number of current adapters that do not fit the service's base or encoder.
    """

    library: str
    generation: int
    loaded_s: float
    checked_s: float
    problem: str | None
    adapters: tuple[AdapterView, ...]
    incompatible: int


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether requests can be served; ``waiting_for`` says what is missing."""

    ready: bool
    waiting_for: tuple[str, ...] = ()


@runtime_checkable
class Engine(Protocol):
    """Whatever segments: this process, or a cluster behind it. Used from one event loop.

    All methods raise :class:`~loraseg.errors.ServiceError` for what the client should hear
    (``not_ready``, ``overloaded``, ``deadline``, ``replica_lost``, ``no_such_library``,
    ``no_such_adapter``); any other error is a fault of the service.
    """

    async def segment(self, request: SegmentRequest) -> SegmentResult:
        """Segment one image. Cancelling gives up the work as soon as possible."""
        ...

    async def catalog(self, library: str) -> CatalogView:
        """Return a library's state."""
        ...

    async def card(self, library: str, name: str) -> dict[str, Any]:
        """Return the card (JSON values, without centroids) of the version in use."""
        ...

    async def refresh(self, library: str) -> CatalogView:
        """Look for a newer generation now."""
        ...

    async def base(self) -> dict[str, Any]:
        """Return what is frozen: name, digest, encoder, prompts, sizes, default settings."""
        ...

    async def readiness(self) -> Readiness:
        """Tell whether base model and catalogs are loaded; never raises."""
        ...
