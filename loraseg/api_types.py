"""JSON bodies of the HTTP API, for the server's OpenAPI schemas and the client's parsing.

The server fills these dataclasses without validation. The client validates what it receives in
strict mode and ignores unknown keys, so that an endpoint may add some.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field, FiniteFloat
from pydantic.json_schema import SkipJsonSchema

__all__ = [
    "AdapterInfo",
    "AdapterList",
    "Example",
    "ExampleList",
    "Health",
    "ImageSize",
    "LibraryInfo",
    "LibraryName",
    "Polygon",
    "Problem",
    "ReadinessInfo",
    "ReplyExplanation",
    "Rle",
    "SegmentReply",
    "SkippedAdapterInfo",
    "UsedAdapterInfo",
    "printable",
]

_MAX_TEXT_CHARS = 2000


def printable(text: str) -> str:
    """Replace control characters, which could steer a terminal, and shorten long text."""
    shown = "".join(char if char.isprintable() else "\ufffd" for char in text)
    return shown if len(shown) <= _MAX_TEXT_CHARS else f"{shown[:_MAX_TEXT_CHARS]} ..."


Text = Annotated[str, AfterValidator(printable)]
Count = Annotated[int, Field(ge=0)]
Byte = Annotated[int, Field(ge=0, le=255)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Png = Annotated[
    str, Field(json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"})
]
OptionalPng = Png | SkipJsonSchema[None]
Corners = tuple[tuple[Count, Count], ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """RFC 9457 problem details; `code` is stable, `detail` is for people."""

    status: int
    detail: Text
    code: Text
    request_id: Text = ""
    type: Text = "about:blank"
    title: Text = ""


@dataclass(frozen=True, slots=True)
class UsedAdapterInfo:
    """An adapter in the mix of an image."""

    name: Text
    version: int | Text
    digest: Annotated[Digest, Field(description="sha256 of the bytes that were used.")]
    weight: Annotated[FiniteFloat, Field(description="Mixing weight.")]
    distance: Annotated[
        FiniteFloat | None,
        Field(description="From the image to the adapter's centroid; null if not computed."),
    ]


@dataclass(frozen=True, slots=True)
class SkippedAdapterInfo:
    """An adapter that is out of service, with the reason."""

    name: Text
    version: int | Text
    digest: Text
    reason: Text


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Size of an image in pixels."""

    width: Count
    height: Count


@dataclass(frozen=True, slots=True)
class Rle:
    """The pixels of one class as run lengths."""

    class_id: Count
    size: Annotated[tuple[Count, Count], Field(description="Height and width.")]
    counts: Annotated[str, Field(description="Compressed run lengths in COCO's format.")]
    area: Annotated[Count, Field(description="Number of pixels.")]


@dataclass(frozen=True, slots=True)
class Polygon:
    """One connected region of a class."""

    class_id: Count
    exterior: Annotated[Corners, Field(description="Corners (x, y) along the pixels' edges.")]
    holes: tuple[Corners, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyExplanation:
    """How a result was computed: the adapters, the model and the time of each stage."""

    mode: Annotated[Text, Field(description="As requested.")]
    library: Annotated[Text, Field(description="The endpoint's name of the library.")]
    generation: Annotated[
        Count | None, Field(description="Of its catalog; null if no adapter was requested.")
    ]
    base: Annotated[Digest, Field(description="sha256 of the frozen base model.")]
    mix: Annotated[
        Digest | None, Field(description="Digest of the fused adapter; null for the bare base.")
    ]
    adapters: Annotated[
        tuple[UsedAdapterInfo, ...], Field(description="The fused adapters, nearest first.")
    ]
    fallback: Annotated[
        Text | None,
        Field(description="Why the bare base was used although adapters were requested."),
    ]
    skipped: Annotated[
        tuple[SkippedAdapterInfo, ...],
        Field(description="Visible adapters that are out of service."),
    ]
    tiles: Annotated[
        Count, Field(description="Number of overlapping tiles; 1 for an image that was not cut.")
    ]
    batch: Annotated[
        Count, Field(description="Number of images in the same pass through the model.")
    ]
    timing_ms: Annotated[
        Mapping[Text, FiniteFloat],
        Field(description="Of decode, queue, embed, retrieve, load, segment, encode; and total."),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentReply(ReplyExplanation):
    """Reply for one image whose ``return`` names at least ``mask`` and ``explanation``."""

    request_id: Text
    image: ImageSize
    classes: Annotated[
        tuple[Text, ...], Field(description="The index of a class is its id in the label map.")
    ]
    class_map: Mapping[Text, Text]
    palette: Annotated[tuple[tuple[Byte, Byte, Byte], ...], Field(description="RGB of each class.")]
    shares: Annotated[
        Mapping[Text, FiniteFloat], Field(description="Share of the pixels of each class.")
    ]
    segmentation_mask: Annotated[Png, Field(description="Indexed: pixel values are class ids.")]
    confidence: Annotated[
        OptionalPng, Field(description="Grey: 255 times the score of the predicted class.")
    ] = None
    entropy: Annotated[
        OptionalPng, Field(description="Grey: 255 times the entropy of the classes' scores.")
    ] = None
    overlay: Annotated[OptionalPng, Field(description="The image under the classes' colours.")] = (
        None
    )
    rle: tuple[Rle, ...] | SkipJsonSchema[None] = None
    polygons: tuple[Polygon, ...] | SkipJsonSchema[None] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterInfo:
    """An adapter that the endpoint serves."""

    name: Text
    version: Annotated[Count, Field(description="That the name points to now.")]
    digest: Annotated[Digest, Field(description="sha256 of its files.")]
    size_bytes: Annotated[Count, Field(description="Of its files.")]
    classes: Annotated[tuple[Text, ...], Field(description="Class names of its training.")]
    images: Annotated[Count | None, Field(description="Number of training images, if known.")]
    unavailable: Annotated[
        Text | None, Field(description="Why it is out of service; null if it is not.")
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterList:
    """The visible adapters of a library, by name."""

    library: Text
    generation: Count
    adapters: tuple[AdapterInfo, ...]


@dataclass(frozen=True, slots=True)
class LibraryName:
    """One of the endpoint's libraries."""

    library: Text


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryInfo:
    """State of a library in an endpoint."""

    library: Text
    generation: Annotated[Count, Field(description="Catalog generation in use.")]
    loaded_s: Annotated[FiniteFloat, Field(description="Seconds since that generation was loaded.")]
    checked_s: Annotated[
        FiniteFloat,
        Field(description="Seconds since the store last confirmed that it is the newest."),
    ]
    problem: Annotated[Text | None, Field(description="Why the latest check failed.")]
    adapters: Annotated[Count, Field(description="Visible adapters that fit the base.")]
    unavailable: Annotated[Count, Field(description="Number of those that are out of service.")]
    misfits: Annotated[Count, Field(description="Adapters that do not fit the base or encoder.")]
    libraries: Annotated[
        tuple[LibraryName, ...], Field(description="All; the first is the default.")
    ]


@dataclass(frozen=True, slots=True)
class Health:
    """Reply of a process that runs."""

    status: Text


@dataclass(frozen=True, slots=True)
class ReadinessInfo:
    """Whether models and catalogs are loaded, and what is missing."""

    ready: bool
    waiting_for: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """An image to try, with class names for it."""

    name: Text
    url: Text
    classes: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class ExampleList:
    """Images to try."""

    examples: tuple[Example, ...]
