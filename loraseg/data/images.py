"""Reads images and masks from disk, bounded in size, by the decoder for untrusted images."""

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from loraseg.data.untrusted_images import decode_image
from loraseg.errors import DatasetError
from loraseg.image_limits import DECODE_ERRORS, MAX_PIXELS
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["open_image", "read_file", "read_image"]


def read_file(path: str | Path) -> bytes:
    """Read a regular file; devices and pipes, which may have no end, are refused.

    Raises:
        DatasetError: The file is missing, not a regular file or unreadable.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DatasetError(f"{path}: not a regular file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> UInt8[ndarray, "h w 3"]:
    """Read a PNG or JPEG as RGB, by the rules of :func:`~loraseg.data.untrusted_images.to_rgb`.

    Raises:
        DatasetError: The file is missing, or as in
            :func:`~loraseg.data.untrusted_images.decode_image`.
    """
    data = read_file(path)
    try:
        return decode_image(data, max_pixels=max_pixels)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error


def open_image(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG or JPEG without a change of mode or orientation, for masks.

    Args:
        data: The file.
        where: Name of the file, for messages.
        max_pixels: Largest accepted number of pixels.

    Raises:
        DatasetError: The data is broken, cut off, of another format or too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        width, height = image.size
        if width * height > max_pixels:
            raise DatasetError(
                f"{where}: {width} x {height} pixels; at most {max_pixels} pixels are read"
            )
        image.load()
    except DatasetError:
        raise
    except UnidentifiedImageError as error:
        # Pillow's text contains an address in memory; messages must be the same in every run.
        raise DatasetError(f"{where}: not a complete PNG or JPEG image") from error
    except DECODE_ERRORS as error:
        raise DatasetError(f"{where}: not a complete PNG or JPEG image: {error}") from error
    return image
