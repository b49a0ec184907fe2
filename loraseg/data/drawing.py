"""Class colours, a legend for them, and PNG bytes: what all pictures for people share."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loraseg.data.labels import IGNORE, LabelSpace
from loraseg.data.palette import IGNORE_COLOR
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["colorize", "draw_legend", "encode_png", "legend_entries", "pad_to_same_width"]

_LINE_HEIGHT = 22  # height of a line of the legend, pixels
_SWATCH = 12


def encode_png(image: UInt8[ndarray, "h w 3"], *, optimize: bool = True) -> bytes:
    """Return an RGB image as PNG bytes; equal images give equal bytes with one version of Pillow.

    Args:
        image: The picture.
        optimize: A few per cent smaller for three times the work.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", optimize=optimize)
    return buffer.getvalue()


def colorize(labels: UInt8[ndarray, "h w"], label_space: LabelSpace) -> UInt8[ndarray, "h w 3"]:
    """Return the class colours of a label map; ids outside the list are drawn as ignored."""
    table = np.full((256, 3), IGNORE_COLOR, dtype=np.uint8)
    table[: len(label_space)] = label_space.palette
    return table[labels]


def legend_entries(labels: UInt8[ndarray, "h w"], label_space: LabelSpace) -> list[tuple[str, int]]:
    """Return the legend of a label map: (name and share, class id), largest area first."""
    areas = np.bincount(labels.reshape(-1), minlength=256)
    present = sorted(np.flatnonzero(areas[:IGNORE]), key=lambda index: (-areas[index], index))
    return [
        (f"{label_space.names[index]} {100 * areas[index] / labels.size:.0f}%", int(index))
        for index in present
        if index < len(label_space)
    ]


def draw_legend(
    entries: Sequence[tuple[str, int]], label_space: LabelSpace, width: int
) -> UInt8[ndarray, "h w2 3"]:
    """Draw a legend, (text, class id) after (text, class id), in as many lines as it takes.

    It becomes wider than ``width`` if a single entry needs that; without entries it has height 0.
    """
    font = ImageFont.load_default(size=_SWATCH)
    lengths = [int(font.getlength(text)) + _SWATCH + 18 for text, _ in entries]
    width = max([width, *lengths])
    places: list[tuple[int, int]] = []
    x = y = 0
    for length in lengths:
        if x and x + length > width:
            x, y = 0, y + _LINE_HEIGHT
        places.append((x, y))
        x += length
    canvas = Image.new("RGB", (width, y + _LINE_HEIGHT if entries else 0), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for (text, index), (left, top) in zip(entries, places, strict=True):
        box = (left + 4, top + 5, left + 4 + _SWATCH, top + 5 + _SWATCH)
        color = tuple(int(channel) for channel in label_space.palette[index])
        draw.rectangle(box, fill=color, outline=(90, 90, 90))
        draw.text((left + _SWATCH + 9, top + 3), text, fill=(20, 20, 20), font=font)
    return np.asarray(canvas, dtype=np.uint8).reshape(canvas.height, width, 3)


def pad_to_same_width(*parts: UInt8[ndarray, "_ _ 3"]) -> list[UInt8[ndarray, "_ _ 3"]]:
    """Pad pictures with white on the right to the width of the widest."""
    width = max(part.shape[1] for part in parts)
    return [
        np.pad(part, ((0, 0), (0, width - part.shape[1]), (0, 0)), constant_values=255)
        for part in parts
    ]
