"""Encode images to send and decode received maps; sizes are checked before decoding."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from loraseg.errors import DatasetError
from loraseg.image_limits import DECODE_ERRORS, MAX_PIXELS

__all__ = ["ImageInput", "Upload", "decode_map", "prepare_upload"]

ImageInput = ndarray | bytes | Path | str

_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg"}


@dataclass(frozen=True, slots=True)
class Upload:
    """An encoded image.

    Attributes:
        data: The bytes of a PNG or JPEG file.
        content_type: Its media type.
        shapes: Possible (height, width) of its label map: two for a file, since the EXIF
            orientation of a JPEG may rotate it.
    """

    data: bytes
    content_type: str
    shapes: frozenset[tuple[int, int]]

    @property
    def pixels(self) -> int:
        """Return the number of pixels."""
        height, width = next(iter(self.shapes))
        return height * width


def prepare_upload(image: ImageInput) -> Upload:
    """Encode an array losslessly, or check the header of a file, which is sent unchanged.

    Args:
        image: RGB, uint8 (h, w, 3); or a PNG or JPEG file, as bytes or as a path.

    Raises:
        DatasetError: The array has another dtype or shape, the file cannot be read or has another
            format, or there are too many pixels.
    """
    if isinstance(image, ndarray):
        return _encode_array(image)
    if isinstance(image, bytes):
        return _check_file(image, "the image")
    try:
        return _check_file(Path(image).read_bytes(), str(image))
    except FileNotFoundError as error:
        raise DatasetError(f"{image}: no such file") from error
    except OSError as error:
        raise DatasetError(f"{image}: cannot be read: {error.strerror}") from error


def decode_map(png: bytes, shapes: frozenset[tuple[int, int]]) -> ndarray:
    """Decode an 8-bit PNG of one channel, grey or indexed, to uint8 (h, w).

    Raises:
        ValueError: Not a PNG, damaged, of another mode, or its size is not among ``shapes``.
    """
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
            width, height = picture.size
            if picture.mode not in ("L", "P") or (height, width) not in shapes:
                raise ValueError(f"mode {picture.mode}, {width} x {height}, expected one of 8 bits")
            return np.array(picture)
    except DECODE_ERRORS as error:
        raise ValueError(f"not the expected PNG: {error}") from error


def _encode_array(image: ndarray) -> Upload:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DatasetError(
            f"image: got {image.dtype} {image.shape}, expected uint8 (height, width, 3)"
        )
    height, width = image.shape[:2]
    _check_pixels(height, width, "image")
    buffer = io.BytesIO()
    # Low effort: sending a few percent more takes less time than stronger compression.
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", compress_level=1)
    return Upload(buffer.getvalue(), "image/png", frozenset({(height, width)}))


def _check_file(data: bytes, what: str) -> Upload:
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_MEDIA_TYPES)) as picture:
            width, height = picture.size
            content_type = _MEDIA_TYPES[picture.format or "PNG"]
    except DECODE_ERRORS as error:
        raise DatasetError(f"{what}: not a PNG or JPEG image") from error
    _check_pixels(height, width, what)
    return Upload(data, content_type, frozenset({(height, width), (width, height)}))


def _check_pixels(height: int, width: int, what: str) -> None:
    if height * width > MAX_PIXELS:
        raise DatasetError(f"{what}: {width} x {height} pixels; at most {MAX_PIXELS} are sent")
