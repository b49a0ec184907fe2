"""Pictures of a report as data URIs, so that the page needs no other file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from loraseg.data.drawing import encode_png
from loraseg.data.labels import IGNORE, LabelSpace
from loraseg.data.masks import encode_mask
from loraseg.data.palette import IGNORE_COLOR
from loraseg.errors import DatasetError
from loraseg.reports.formatting import ABSENT, share_of
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["MixEntry", "PictureSheet", "Prediction", "ReportExample"]

_MAX_SIDE = 480
# Pictures up to this size stay lossless and are enlarged without smoothing.
_MAX_LOSSLESS_SIDE = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureSheet:
    """A PNG file shown at its own size; wide ones scroll.

    Attributes:
        png: The file.
        alt: Description for readers who do not see it.
        caption: Text above it; may be empty.
    """

    macro: ClassVar[str] = "picture_sheet"
    png: bytes
    alt: str
    caption: str = ""

    def view(self) -> dict[str, str]:
        """Return caption, description and data URI."""
        uri = _data_uri("image/png", self.png)
        return {"caption": self.caption, "alt": self.alt, "uri": uri}


@dataclass(frozen=True, kw_only=True, slots=True)
class MixEntry:
    """An adapter in a mix.

    Attributes:
        adapter: Name of the adapter.
        weight: Mixing weight in [0, 1].
        distance: Euclidean distance of image and centroid; None without retrieval.
    """

    adapter: str
    weight: float
    distance: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """A label map of an example.

    Attributes:
        title: What predicted it: "truth", "zero-shot", "SemLA".
        labels: Class ids of the example's label space, 255 = ignore.
        score: mIoU of this image in [0, 1], if known.
    """

    title: str
    labels: UInt8[ndarray, "h w"]
    score: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportExample:
    """An image with its label maps side by side.

    Attributes:
        title: Heading, such as "fog-heavy, image 0003".
        image: RGB.
        label_space: Classes of all label maps.
        predictions: The label maps in the order in which they are shown, the truth first.
        retrieved: The adapters mixed for this image, heaviest first.
    """

    macro: ClassVar[str] = "example"
    title: str
    image: UInt8[ndarray, "h w 3"]
    label_space: LabelSpace
    predictions: Sequence[Prediction]
    retrieved: Sequence[MixEntry] = ()

    def view(self) -> "_ExampleView":
        """Encode the pictures and list the classes that they show.

        Raises:
            DatasetError: A label map holds ids outside the label space, or its size differs from
                the image's.
        """
        for prediction in self.predictions:
            if prediction.labels.shape != self.image.shape[:2]:
                raise DatasetError(
                    f"example {self.title!r}: label map {prediction.title!r} of "
                    f"{prediction.labels.shape} for an image of {self.image.shape[:2]}"
                )
        image = _shrink(self.image, Image.Resampling.BOX)
        pictures = [_PictureView("image", "", f"{self.title}: the image", *_photo(image))]
        for prediction in self.predictions:
            labels = _shrink(prediction.labels, Image.Resampling.NEAREST)
            uri = _data_uri("image/png", encode_mask(labels, self.label_space))
            score = "" if prediction.score is None else f"{100 * prediction.score:.1f}"
            alt = f"{self.title}: label map of {prediction.title}"
            pictures.append(_PictureView(prediction.title, score, alt, uri, *labels.shape))
        return _ExampleView(
            title=self.title,
            pictures=pictures,
            legend=self._legend(),
            mix=[_MixView.from_entry(entry) for entry in self.retrieved],
        )

    def _legend(self) -> list[tuple[str, str]]:
        """Return (name, CSS colour) of the classes that the label maps show, ordered by id."""
        present = {int(i) for prediction in self.predictions for i in np.unique(prediction.labels)}
        entries = [
            (name, _css_color(self.label_space.palette[index]))
            for index, name in enumerate(self.label_space.names)
            if index in present
        ]
        if IGNORE in present:
            entries.append(("not labelled", _css_color(IGNORE_COLOR)))
        return entries


@dataclass(frozen=True, slots=True)
class _PictureView:
    """A picture: caption, score in percent, description, data URI and size in pixels."""

    title: str
    score: str
    alt: str
    uri: str
    height: int
    width: int

    @property
    def is_small(self) -> bool:
        """Whether the page enlarges it without smoothing."""
        return max(self.height, self.width) <= _MAX_LOSSLESS_SIDE


@dataclass(frozen=True, slots=True)
class _MixView:
    adapter: str
    share: float
    weight: str
    distance: str

    @classmethod
    def from_entry(cls, entry: MixEntry) -> "_MixView":
        distance = ABSENT if entry.distance is None else f"{entry.distance:.3f}"
        return cls(entry.adapter, share_of(entry.weight, 1.0), f"{entry.weight:.3f}", distance)


@dataclass(frozen=True, slots=True)
class _ExampleView:
    title: str
    pictures: list[_PictureView]
    legend: list[tuple[str, str]]
    mix: list[_MixView]


def _shrink(pixels: ndarray, resampling: Image.Resampling) -> ndarray:
    """Resize (h, w) or (h, w, 3) pixels so that the longer side is at most 480."""
    factor = _MAX_SIDE / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    height, width = (max(1, round(length * factor)) for length in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), resampling))


def _photo(image: UInt8[ndarray, "h w 3"]) -> tuple[str, int, int]:
    """Return the data URI, PNG for small images and JPEG for others, and height and width."""
    height, width = image.shape[:2]
    if max(height, width) <= _MAX_LOSSLESS_SIDE:
        return _data_uri("image/png", encode_png(image)), height, width
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="JPEG", quality=85)
    return _data_uri("image/jpeg", buffer.getvalue()), height, width


def _data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _css_color(color: UInt8[ndarray, "3"] | tuple[int, int, int]) -> str:
    return "#" + "".join(f"{int(channel):02x}" for channel in color)
