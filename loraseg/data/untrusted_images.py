"""Decodes untrusted images; their cost is checked in the header, before Pillow reads them."""

import io
import struct

import numpy as np
from PIL import Image, ImageOps

from loraseg.errors import DatasetError
from loraseg.image_limits import DECODE_ERRORS, MAX_PIXELS
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["decode_image", "image_size", "to_rgb"]

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_JPEG_SCAN = b"\xff\xda"
# Each scan of a progressive JPEG covers the whole image and may have only ten bytes: thousands of
# scans occupy a decoder for hours. Encoders write about ten.
_MAX_SCANS = 100
# Segments before the frame header: profiles and thumbnails in parts of 64 KiB.
_MAX_SEGMENTS = 1000
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Return the width and height in the header of a PNG or JPEG, before EXIF orientation.

    Raises:
        DatasetError: The data is neither, or cut off before the size.
    """
    head = bytes(data[:24])
    if head.startswith(_PNG):
        if len(head) < 24 or head[12:16] != b"IHDR":
            raise DatasetError("the PNG is broken or cut off")
        return struct.unpack(">II", head[16:24])
    if head.startswith(_JPEG):
        return _jpeg_size(data)
    raise DatasetError("the image is neither a PNG nor a JPEG")


def decode_image(
    data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS
) -> UInt8[ndarray, "h w 3"]:
    """Decode a PNG or JPEG by the rules of :func:`to_rgb`; of an animated PNG, the first frame.

    Messages contain no details of the process, and the time is bounded by the number of pixels.

    Raises:
        DatasetError: The data is broken, cut off, of another format, has more than ``max_pixels``
            pixels or none, or is a JPEG with over 100 scans.
    """
    width, height = image_size(data)
    if not 1 <= width * height <= max_pixels:
        raise DatasetError(
            f"the image has {width} x {height} pixels; from 1 to {max_pixels} pixels are taken"
        )
    content = bytes(data)
    if content.startswith(_JPEG) and content.count(_JPEG_SCAN) > _MAX_SCANS:
        raise DatasetError(f"the JPEG has over {_MAX_SCANS} scans")
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
        # A second header may follow the first; only the size in the first one was checked.
        if image.size == (width, height):
            image.load()
            return to_rgb(image)
    except DECODE_ERRORS as error:
        raise DatasetError("the image is broken or cut off") from error
    raise DatasetError("the image has two sizes")


def to_rgb(image: Image.Image) -> UInt8[ndarray, "h w 3"]:
    """Convert a decoded image to RGB, values 0 to 255.

    EXIF orientation is applied, because masks are drawn on the image as viewers show it. Grey is
    repeated, 16-bit grey keeps its upper 8 bits, transparency is dropped.

    Raises:
        OSError: Or another of ``DECODE_ERRORS``: the EXIF data is broken.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    # Pillow warns when it drops transparency.
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB"))


def _jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Walk the segments (ITU T.81, B.1.1) up to the frame header."""
    offset = 2
    for _ in range(_MAX_SEGMENTS):
        head = bytes(data[offset : offset + 9])
        if len(head) < 9 or head[0] != 0xFF:
            break
        marker, length = head[1], int.from_bytes(head[2:4])
        if marker == 0xFF:  # a fill byte before the marker
            offset += 1
        elif marker in _FRAME_HEADERS:
            height, width = struct.unpack(">HH", head[5:9])
            return width, height
        elif length < 2:
            break
        else:
            offset += 2 + length
    raise DatasetError("the JPEG is broken or cut off")
