"""What the API asks of an engine, and what it gets back."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from loraseg.inference.request import SegmentRequest, SegmentResult

__all__ = [
    "AdapterView",
    "CatalogView",
    "Engine",
    "Readiness",
]


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
