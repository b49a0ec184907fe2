"""A contact sheet: masks and the images generated from them, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loraseg.data.drawing import colorize, draw_legend, legend_entries, pad_to_same_width
from loraseg.data.labels import LabelSpace
from loraseg.errors import DatasetError
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["SheetRow", "contact_sheet"]

_GAP = 4
_CAPTION_HEIGHT = 16  # height of the line of text above each picture, pixels
_FONT_SIZE = 11
_MIN_HEIGHT = 96  # smaller pictures are enlarged to at least this height, pixels
_MAX_HEIGHT = 256


@dataclass(frozen=True, slots=True, eq=False)
class SheetRow:
    """One row of the sheet: a mask and pictures to its right.

    Attributes:
        title: Caption of the mask.
        mask: Class ids; 255 and unknown ids are drawn as ignored.
        pictures: (caption, RGB picture) from left to right, of any sizes.
    """

    title: str
    mask: UInt8[ndarray, "h w"]
    pictures: Sequence[tuple[str, UInt8[ndarray, "_ _ 3"]]]


def contact_sheet(rows: Sequence[SheetRow], label_space: LabelSpace) -> UInt8[ndarray, "h w 3"]:
    """Draw a row for each mask, in its class colours, and a legend of their classes below.

    The pictures of a row are resized to one height of 96 to 256 pixels: small ones are enlarged by
    an integer factor without smoothing, large ones are shrunk.

    Raises:
        DatasetError: There are no rows.
    """
    if not rows:
        raise DatasetError("sheet: got no rows, expected at least one")
    drawn_rows = [_draw_row(row, label_space) for row in rows]
    width = max(drawn.shape[1] for drawn in drawn_rows)
    ids = np.concatenate([row.mask.reshape(-1) for row in rows])[None]
    legend = draw_legend(legend_entries(ids, label_space), label_space, width)
    return np.concatenate(pad_to_same_width(*drawn_rows, legend))


def _draw_row(row: SheetRow, label_space: LabelSpace) -> UInt8[ndarray, "h w 3"]:
    height = _row_height(row.mask.shape[0])
    colored = _resize_to_height(colorize(row.mask, label_space), height, smooth=False)
    cells = [_add_caption(row.title, colored)]
    for caption, picture in row.pictures:
        smooth = picture.shape[0] > height
        cells.append(_add_caption(caption, _resize_to_height(picture, height, smooth=smooth)))
    return np.concatenate(cells, axis=1)


def _row_height(mask_height: int) -> int:
    if mask_height >= _MIN_HEIGHT:
        return min(mask_height, _MAX_HEIGHT)
    return mask_height * -(-_MIN_HEIGHT // mask_height)


def _resize_to_height(
    picture: UInt8[ndarray, "_ _ 3"], height: int, *, smooth: bool
) -> UInt8[ndarray, "_ _ 3"]:
    if picture.shape[0] == height:
        return picture
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), resampling))


def _add_caption(text: str, picture: UInt8[ndarray, "_ _ 3"]) -> UInt8[ndarray, "_ _ 3"]:
    height, width = picture.shape[:2]
    font = ImageFont.load_default(size=_FONT_SIZE)
    while text and font.getlength(text) > width:
        text = text[:-1]
    canvas = Image.new("RGB", (width + _GAP, height + _CAPTION_HEIGHT + _GAP), (255, 255, 255))
    ImageDraw.Draw(canvas).text((1, 1), text, fill=(20, 20, 20), font=font)
    canvas.paste(Image.fromarray(picture), (0, _CAPTION_HEIGHT))
    return np.asarray(canvas)
