"""Images from disk, fully decoded and bounded in size."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from loraseg.errors import DatasetError
from loraseg.image_limits import DECODE_ERRORS, MAX_PIXELS
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["open_image", "open_image_stream", "read_image", "to_rgb"]


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open and fully decode a PNG or JPEG; of an animated PNG, its first frame.

    Raises:
        DatasetError: The file is missing, broken, cut off, of another format or has over
            ``max_pixels`` pixels.
    """
    try:
        with Path(path).open("rb") as file:
            return open_image_stream(file, str(path), max_pixels=max_pixels)
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error


def open_image_stream(
    file: io.BufferedReader | io.BytesIO, where: str, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Do the same for an open file; ``where`` is what errors call it."""
    try:
        image = Image.open(file, formats=("PNG", "JPEG"))
        width, height = image.size
        if width * height > max_pixels:
            raise DatasetError(
                f"{where}: {width} x {height} pixels; at most {max_pixels} pixels are read"
            )
        image.load()
    except DatasetError:
        raise
    except UnidentifiedImageError as error:
        # Its text has the buffer's address, and a reason must be the same whenever it is told.
        raise DatasetError(f"{where}: not a complete PNG or JPEG image") from error
    except DECODE_ERRORS as error:
        raise DatasetError(f"{where}: not a complete PNG or JPEG image: {error}") from error
    return image


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> UInt8[ndarray, "h w 3"]:
    """Read an image as RGB.

    An EXIF orientation is applied: masks are drawn on what a viewer shows, not on the sensor's
    rows. Grey is repeated, 16-bit grey keeps its upper 8 bits, transparency is dropped.

    Raises:
        DatasetError: As in :func:`open_checked`.
    """
    image = open_image(path, max_pixels=max_pixels)
    try:
        return to_rgb(image)
    except DECODE_ERRORS as error:
        raise DatasetError(f"{path}: the image cannot be turned to RGB: {error}") from error


def to_rgb(image: Image.Image) -> UInt8[ndarray, "h w 3"]:
    """Return the pixels of a decoded image by the rules of :func:`read_image`.

    Raises:
        OSError: Or another of ``DECODE_ERRORS``.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    # Pillow warns that it drops transparency, which is what is wanted.
    image.info.pop("transparency", None)
    return np.array(image.convert("RGB"))
