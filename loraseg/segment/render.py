"""Label maps as pictures: indexed PNG, overlay on the image, legend."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loraseg.data.labels import IGNORE, LabelSpace
from loraseg.data.masks import encode_mask
from loraseg.data.palette import IGNORE_COLOR
from loraseg.errors import DatasetError
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = [
    "colorize",
    "encode_png",
    "grey_png",
    "overlay",
    "overlay_with_legend",
    "palette_png",
]

_BAR = 22  # height of a line of the legend, pixels
_SWATCH = 12


def palette_png(labels: UInt8[ndarray, "h w"], label_space: LabelSpace) -> bytes:
    """Return an indexed PNG: pixel values are class ids, the palette holds the class colours.

    Raises:
        DatasetError: An id is neither in the label space nor 255.
    """
    return encode_mask(labels, label_space)


def encode_png(image: UInt8[ndarray, "h w 3"]) -> bytes:
    """Return an RGB image as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def grey_png(values: Float[ndarray, "h w"]) -> bytes:
    """Return a map such as confidence as a grey PNG of 8 bits.

    Args:
        values: In [0, 1]; a grey level is 255 times that, rounded, halves to even.

    Raises:
        DatasetError: A value is outside [0, 1] or not a number.
    """
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise DatasetError(f"map: values from {values.min()} to {values.max()}; expected 0 to 1")
    # In float64 the product is exact, so that no half is made or lost by rounding twice.
    return encode_mask(np.rint(values * np.float64(255)).astype(np.uint8))


def colorize(labels: UInt8[ndarray, "h w"], label_space: LabelSpace) -> UInt8[ndarray, "h w 3"]:
    """Return the class colours of a label map; ids outside the list are drawn as ignored."""
    table = np.full((256, 3), IGNORE_COLOR, dtype=np.uint8)
    table[: len(label_space)] = label_space.palette
    return table[labels]


def overlay(
    image: UInt8[ndarray, "h w 3"],
    labels: UInt8[ndarray, "lh lw"],
    label_space: LabelSpace,
    *,
    opacity: float = 0.55,
) -> UInt8[ndarray, "h w 3"]:
    """Lay class colours over an image; ignored pixels show the image alone.

    Args:
        image: RGB.
        labels: Class ids, 255 = ignore, of the image's size.
        label_space: The classes.
        opacity: Share of the class colour, in [0, 1].

    Raises:
        DatasetError: The sizes differ.
    """
    if labels.shape != image.shape[:2]:
        raise DatasetError(f"label map {labels.shape} over an image of {image.shape[:2]}")
    share = np.where(labels < len(label_space), opacity, 0.0).astype(np.float32)[..., None]
    blended = image * (1 - share) + colorize(labels, label_space) * share
    return np.rint(blended).astype(np.uint8)


def overlay_with_legend(
    image: UInt8[ndarray, "h w 3"],
    labels: UInt8[ndarray, "lh lw"],
    label_space: LabelSpace,
    *,
    opacity: float = 0.55,
) -> UInt8[ndarray, "h2 w2 3"]:
    """Return the overlay with the classes that occur listed below it, largest area first.

    The picture becomes as wide as the longest entry needs; the image keeps its size.

    Raises:
        DatasetError: The sizes differ.
    """
    picture = overlay(image, labels, label_space, opacity=opacity)
    areas = np.bincount(labels.reshape(-1), minlength=256)
    present = sorted(np.flatnonzero(areas[:IGNORE]), key=lambda index: (-areas[index], index))
    entries = [
        (f"{label_space.names[index]} {100 * areas[index] / labels.size:.0f}%", int(index))
        for index in present
        if index < len(label_space)
    ]
    return np.concatenate(_same_width(picture, _legend(entries, label_space, picture.shape[1])))


def _legend(
    entries: list[tuple[str, int]], label_space: LabelSpace, width: int
) -> UInt8[ndarray, "h w 3"]:
    font = ImageFont.load_default(size=_SWATCH)
    lengths = [int(font.getlength(text)) + _SWATCH + 18 for text, _ in entries]
    width = max([width, *lengths])
    places: list[tuple[int, int]] = []
    x = y = 0
    for length in lengths:
        if x and x + length > width:
            x, y = 0, y + _BAR
        places.append((x, y))
        x += length
    canvas = Image.new("RGB", (width, y + _BAR if entries else 0), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for (text, index), (left, top) in zip(entries, places, strict=True):
        box = (left + 4, top + 5, left + 4 + _SWATCH, top + 5 + _SWATCH)
        color = tuple(int(channel) for channel in label_space.palette[index])
        draw.rectangle(box, fill=color, outline=(90, 90, 90))
        draw.text((left + _SWATCH + 9, top + 3), text, fill=(20, 20, 20), font=font)
    return np.asarray(canvas, dtype=np.uint8).reshape(canvas.height, width, 3)


def _same_width(*parts: UInt8[ndarray, "_ _ 3"]) -> list[UInt8[ndarray, "_ _ 3"]]:
    width = max(part.shape[1] for part in parts)
    return [
        np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255)
        for part in parts
    ]
