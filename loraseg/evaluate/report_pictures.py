"""Example pictures of a report, as data URIs small enough for one HTML file."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from loraseg.data.labels import IGNORE
from loraseg.data.palette import IGNORE_COLOR
from loraseg.errors import DatasetError
from loraseg.evaluate.report_data import MixEntry, ReportExample
from loraseg.segment.render import encode_png, palette_png
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["RenderedExample", "render_example"]

_MAX_SIDE = 480
# Up to this many pixels a side a picture stays lossless and is enlarged without smoothing.
_MAX_LOSSLESS_SIDE = 160


@dataclass(frozen=True, slots=True)
class RenderedPicture:
    """A picture: caption, data URI, size in pixels and whether to enlarge it unsmoothed."""

    title: str
    score: str
    alt: str
    uri: str
    width: int
    height: int
    is_small: bool


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """An example as printed."""

    title: str
    note: str
    pictures: tuple[RenderedPicture, ...]
    legend: tuple[tuple[str, str], ...]
    retrieved: tuple[MixEntry, ...]


def render_example(example: ReportExample) -> RenderedExample:
    """Encode the pictures of an example and collect the classes that they show.

    Raises:
        DatasetError: A label map holds other ids than its label space's and 255, or has another
            size than the image.
    """
    for prediction in example.predictions:
        if prediction.labels.shape != example.image.shape[:2]:
            raise DatasetError(
                f"example {example.title!r}: label map {prediction.title!r} of "
                f"{prediction.labels.shape} for an image of {example.image.shape[:2]}"
            )
    image = _shrink(example.image, Image.Resampling.BOX)
    pictures = [_picture("image", "", f"{example.title}: the image", _photo_uri(image), image)]
    for prediction in example.predictions:
        labels = _shrink(prediction.labels, Image.Resampling.NEAREST)
        uri = _data_uri("image/png", palette_png(labels, example.label_space))
        score = "" if prediction.score is None else f"{100 * prediction.score:.1f}"
        alt = f"{example.title}: label map of {prediction.title}"
        pictures.append(_picture(prediction.title, score, alt, uri, labels))
    return RenderedExample(
        title=example.title,
        note=example.note,
        pictures=tuple(pictures),
        legend=_legend(example),
        retrieved=example.retrieved,
    )


def _picture(title: str, score: str, alt: str, uri: str, pixels: ndarray) -> RenderedPicture:
    height, width = pixels.shape[:2]
    return RenderedPicture(
        title, score, alt, uri, width, height, max(height, width) <= _MAX_LOSSLESS_SIDE
    )


def _shrink(pixels: ndarray, how: Image.Resampling) -> ndarray:
    factor = _MAX_SIDE / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    height, width = (max(1, round(length * factor)) for length in pixels.shape[:2])
    return np.array(Image.fromarray(pixels).resize((width, height), how))


def _photo_uri(image: UInt8[ndarray, "h w 3"]) -> str:
    if max(image.shape[:2]) <= _MAX_LOSSLESS_SIDE:
        return _data_uri("image/png", encode_png(image))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="JPEG", quality=85)
    return _data_uri("image/jpeg", buffer.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _legend(example: ReportExample) -> tuple[tuple[str, str], ...]:
    """Return name and colour of the classes that any of the maps shows, in order of their ids."""
    present = {int(i) for one in example.predictions for i in np.unique(one.labels)}
    entries = [
        (name, _hex(example.label_space.palette[index]))
        for index, name in enumerate(example.label_space.names)
        if index in present
    ]
    if IGNORE in present:
        entries.append(("not labelled", _hex(IGNORE_COLOR)))
    return tuple(entries)


def _hex(color: UInt8[ndarray, "3"] | tuple[int, int, int]) -> str:
    return "#" + "".join(f"{int(channel):02x}" for channel in color)
