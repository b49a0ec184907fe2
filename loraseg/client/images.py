"""Images to send and maps that come back, with every size checked before it costs memory."""

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
        shapes: What (height, width) a label map of it may have: two for a file, since a JPEG may
            ask its viewer to turn it.
    """

    data: bytes
    content_type: str
    shapes: frozenset[tuple[int, int]]

    @property
    def pixels(self) -> int:
        """Return their number."""
        height, width = next(iter(self.shapes))
        return height * width


def prepare_upload(image: ImageInput) -> Upload:
    """Encode an array without loss; read and check the header of a file, which is sent as it is.

    Args:
        image: RGB, uint8 (h, w, 3); or a PNG or JPEG file, as bytes or as a path.

    Raises:
        DatasetError: Another kind of array, a file that cannot be read, has another format or too
            many pixels.
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
        ValueError: Not a PNG, of another kind, damaged, or of none of the ``shapes``.
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
    # Little effort: a local network is faster than the last percent of compression.
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
