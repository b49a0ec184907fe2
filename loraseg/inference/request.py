"""One image on its way from a caller to the model, and its result on the way back.

Command line, batch jobs, evaluation and endpoint build a :class:`SegmentRequest`; retrieval adds
the adapters, the model turns it into a :class:`SegmentResult`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loraseg.inference.adapter_ref import AdapterFailure
from loraseg.inference.selection import AdapterMode, AdapterQuery, AdapterSelection, TilingMode
from loraseg.tensor_types import ndarray

__all__ = ["AdapterContribution", "Explanation", "MapName", "SegmentRequest", "SegmentResult"]

MapName = Literal["confidence", "entropy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRequest:
    """One image to segment.

    Attributes:
        image: RGB, uint8 (h, w, 3).
        classes: Distinct names; their order gives the ids of the label map.
        query: How adapters are chosen.
        library: Name of the library in an endpoint; empty where there is only one.
        visible: Name patterns (``fnmatch``) of the adapters that may be used; None for all.
        maps: Further maps to compute: ``confidence``, ``entropy``.
        tiling: Whether the image is cut into overlapping tiles; ``auto`` decides by its size.
        keep_scores: Whether the result has the scores of all classes. Not possible with tiles.
        deadline: ``time.time()`` after which the result is not used any more.
        failed: Adapters that an earlier selection named and that could not be loaded.
        selection: The chosen adapters; None before retrieval.
    """

    image: ndarray
    classes: tuple[str, ...]
    query: AdapterQuery
    library: str = ""
    visible: tuple[str, ...] | None = None
    maps: frozenset[str] = field(default_factory=frozenset[str])
    tiling: TilingMode = "auto"
    keep_scores: bool = False
    deadline: float = float("inf")
    failed: tuple[AdapterFailure, ...] = ()
    selection: AdapterSelection | None = None


@dataclass(frozen=True, slots=True)
class AdapterContribution:
    """One adapter's share of a result.

    Attributes:
        name: Of the chosen entry.
        version: Of the chosen entry.
        digest: sha256 of the weight files that were used.
        weight: Mixing weight.
        distance: From the image to the adapter's domain; None if no distance was computed.
    """

    name: str
    version: int | str
    digest: str
    weight: float
    distance: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which model segmented an image, and why.

    Attributes:
        mode: The requested mode.
        base: sha256 of the base model.
        mix: Digest of the fused adapter, None for the bare base.
        adapters: The fused adapters, nearest first.
        fallback: Why the bare base was used although adapters were requested, else None.
    """

    mode: AdapterMode
    base: str
    mix: str | None
    adapters: tuple[AdapterContribution, ...] = ()
    fallback: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "adapters": [asdict(used) for used in self.adapters]}


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentResult:
    """The result for one image.

    Attributes:
        label_map: Class index of each pixel, (h, w), uint8 up to 255 classes, else int32.
        explanation: Base and adapters that were used.
        scores: Sigmoid scores (classes, h, w) in [0, 1], if requested.
        confidence: Score of the predicted class, float32 (h, w) in [0, 1], if requested.
        entropy: Of the scores normalised to sum 1, divided by log(classes): float32 (h, w) in
            [0, 1], if requested; 0 where one class has all the score, or is the only one.
        tiles: Number of overlapping tiles; 1 for an image that was not cut.
        generation: Catalog generation that the adapters were chosen from; None if no adapter was
            requested.
        skipped: Visible adapters of the library that could not be loaded and are out of service.
        timing_ms: By stage: ``embed``, ``retrieve``, ``load``, ``segment``; an endpoint adds
            ``queue`` for waiting and transport.
        batch_size: Number of images in the same pass through the model.
    """

    label_map: ndarray
    explanation: Explanation
    scores: ndarray | None = None
    confidence: ndarray | None = None
    entropy: ndarray | None = None
    tiles: int = 1
    generation: int | None = None
    skipped: tuple[AdapterFailure, ...] = ()
    timing_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    batch_size: int = 1
