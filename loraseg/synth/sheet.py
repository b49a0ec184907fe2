"""One picture that shows masks and what was made of them, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loraseg.data.drawing import class_areas, colorize, legend, same_width
from loraseg.data.labels import LabelSpace
from loraseg.errors import DatasetError
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["SheetRow", "contact_sheet"]

_GAP = 4
_CAPTION = 16  # height of a line of text above each picture, pixels
_FONT = 11
_SMALLEST = 96  # height that small pictures are enlarged to, pixels
_LARGEST = 256


@dataclass(frozen=True, slots=True, eq=False)
class SheetRow:
    """A mask and pictures beside it.

    Attributes:
        title: Above the mask.
        mask: Class ids; 255 and unknown ids are drawn as ignored.
        pictures: (caption, RGB picture) from left to right, of any sizes.
    """

    title: str
    mask: UInt8[ndarray, "h w"]
    pictures: Sequence[tuple[str, UInt8[ndarray, "_ _ 3"]]]


def contact_sheet(rows: Sequence[SheetRow], label_space: LabelSpace) -> UInt8[ndarray, "h w 3"]:
    """Draw a row for each mask, in its class colours, and a legend of all classes below.

    All pictures of a row get one height, from 96 to 256 pixels: small ones are enlarged by whole
    factors without smoothing, large ones shrunk.

    Raises:
        DatasetError: There is no row.
    """
    if not rows:
        raise DatasetError("sheet: got no rows, expected at least one")
    lines = [_line(row, label_space) for row in rows]
    width = max(line.shape[1] for line in lines)
    seen = np.concatenate([row.mask.reshape(-1) for row in rows])[None]
    below = legend(class_areas(seen, label_space), label_space, width)
    return np.concatenate(same_width(*lines, below))


def _line(row: SheetRow, label_space: LabelSpace) -> UInt8[ndarray, "h w 3"]:
    height = _height(row.mask.shape[0])
    colored = _to_height(colorize(row.mask, label_space), height, smooth=False)
    cells = [_captioned(row.title, colored)]
    for caption, picture in row.pictures:
        smooth = picture.shape[0] > height
        cells.append(_captioned(caption, _to_height(picture, height, smooth=smooth)))
    return np.concatenate(cells, axis=1)


def _height(own: int) -> int:
    if own >= _SMALLEST:
        return min(own, _LARGEST)
    return own * -(-_SMALLEST // own)


def _to_height(
    picture: UInt8[ndarray, "_ _ 3"], height: int, *, smooth: bool
) -> UInt8[ndarray, "_ _ 3"]:
    if picture.shape[0] == height:
        return picture
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), how))


def _captioned(text: str, picture: UInt8[ndarray, "_ _ 3"]) -> UInt8[ndarray, "_ _ 3"]:
    height, width = picture.shape[:2]
    font = ImageFont.load_default(size=_FONT)
    while text and font.getlength(text) > width:
        text = text[:-1]
    canvas = Image.new("RGB", (width + _GAP, height + _CAPTION + _GAP), (255, 255, 255))
    ImageDraw.Draw(canvas).text((1, 1), text, fill=(20, 20, 20), font=font)
    canvas.paste(Image.fromarray(picture), (0, _CAPTION))
    return np.asarray(canvas)
