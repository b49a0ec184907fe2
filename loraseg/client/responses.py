"""What an endpoint answers, as numpy arrays and plain values."""

from collections.abc import Mapping
from dataclasses import dataclass

from numpy import ndarray

__all__ = ["AdapterInfo", "LibraryInfo", "SegmentResponse", "SkippedAdapterInfo", "UsedAdapterInfo"]


@dataclass(frozen=True, slots=True)
class UsedAdapterInfo:
    """One adapter's part in a reply; ``distance`` is None where nothing was measured."""

    name: str
    version: int | str
    digest: str
    weight: float
    distance: float | None


@dataclass(frozen=True, slots=True)
class SkippedAdapterInfo:
    """An adapter that was out of service, and why."""

    name: str
    version: int | str
    digest: str
    reason: str


# Not comparable: equality of arrays is not one truth value.
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SegmentResponse:
    """One segmented image.

    Attributes:
        label_map: A class index per pixel, uint8 (h, w), of the image as a viewer shows it.
        class_names: By index, as the endpoint understood them.
        palette: RGB of each class, uint8 (n, 3).
        confidence: Score of the shown class, float32 (h, w) in [0, 1] in steps of 1/255, if asked.
        entropy: Of the classes' scores, float32 (h, w) in [0, 1] in steps of 1/255, if asked.
        mode: ``fused``, ``uniform`` or ``base``, as asked.
        library: The endpoint's name of the library that was used.
        generation: Of the library's catalog; None if no adapter was asked for.
        base: sha256 of the base model.
        mix: Digest of the fused adapter, None for the bare base.
        adapters: Those in the mix, nearest first; digests are of the bytes that were used.
        fallback: Why the bare base was used although adapters were asked for, else None.
        skipped: Adapters of the library that were out of service.
        tiles: How many overlapping tiles the image was cut into; 1 for none.
        timing_ms: Milliseconds by stage and in ``total``, as measured by the endpoint.
        request_id: The endpoint's, for its logs.
    """

    label_map: ndarray
    class_names: tuple[str, ...]
    palette: ndarray
    confidence: ndarray | None
    entropy: ndarray | None
    mode: str
    library: str
    generation: int | None
    base: str
    mix: str | None
    adapters: tuple[UsedAdapterInfo, ...]
    fallback: str | None
    skipped: tuple[SkippedAdapterInfo, ...]
    tiles: int
    timing_ms: Mapping[str, float]
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """An adapter that the endpoint serves.

    Attributes:
        name: Of the adapter.
        version: That the name points to now.
        digest: sha256 of its files.
        size_bytes: Of its files.
        classes: That it was trained with.
        images: That it was trained with, if known.
        unavailable: Why it is out of service; None if it is not.
    """

    name: str
    version: int
    digest: str
    size_bytes: int
    classes: tuple[str, ...]
    images: int | None
    unavailable: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryInfo:
    """A library as the endpoint sees it.

    Attributes:
        library: Its name there.
        generation: Of the catalog in use.
        loaded_s: Seconds since it came into use.
        checked_s: Seconds since the store last confirmed that it is the newest.
        problem: Why the latest check failed; None if it did not.
        adapters: Number of adapters that fit the base.
        unavailable: Number of those that are out of service.
        misfits: Number of current adapters that do not fit the base or the encoder.
    """

    library: str
    generation: int
    loaded_s: float
    checked_s: float
    problem: str | None
    adapters: int
    unavailable: int
    misfits: int
