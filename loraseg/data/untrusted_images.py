"""Images from somebody unknown: their cost is known from the header, before Pillow sees them."""

import io
import struct

from PIL import Image

from loraseg.data.images import to_rgb
from loraseg.errors import DatasetError
from loraseg.image_limits import DECODE_ERRORS, MAX_PIXELS
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["decode_image", "image_size"]

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_JPEG_SCAN = b"\xff\xda"
# Each scan of a progressive JPEG goes over the whole picture and may take but ten bytes: thousands
# of them keep a decoder busy for hours. Programs write about ten.
_MAX_SCANS = 100
# Segments before the frame header: profiles and thumbnails in pieces of 64 KiB.
_MAX_SEGMENTS = 1000
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Return width and height that a PNG or JPEG claims, before orientation.

    Raises:
        DatasetError: It is neither, or cut off before the size.
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
    """Decode a PNG or JPEG by the rules of :func:`loraseg.data.images.read_image`.

    Messages say nothing of this process, and decoding takes no longer than the pixels are worth.

    Raises:
        DatasetError: The bytes are broken, cut off, of another format, have over ``max_pixels``
            pixels or none, or are a JPEG of more scans than any program writes.
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
        # A second header may follow the first; nothing was set aside for what that one says.
        if image.size == (width, height):
            image.load()
            return to_rgb(image)
    except DECODE_ERRORS as error:
        raise DatasetError("the image is broken or cut off") from error
    raise DatasetError("the image has two sizes")


def _jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Walk the segments (ITU T.81, B.1.1) up to the frame header."""
    place = 2
    for _ in range(_MAX_SEGMENTS):
        head = bytes(data[place : place + 9])
        if len(head) < 9 or head[0] != 0xFF:
            break
        marker, length = head[1], int.from_bytes(head[2:4])
        if marker == 0xFF:  # a fill byte before the marker
            place += 1
        elif marker in _FRAME_HEADERS:
            height, width = struct.unpack(">HH", head[5:9])
            return width, height
        elif length < 2:
            break
        else:
            place += 2 + length
    raise DatasetError("the JPEG is broken or cut off")
