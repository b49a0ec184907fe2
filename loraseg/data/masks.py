"""Masks as PNG: one channel of class ids, 255 = ignore, with a palette for viewers."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from loraseg.data.images import open_image, read_file
from loraseg.data.labels import IGNORE, LabelSpace
from loraseg.data.palette import IGNORE_COLOR
from loraseg.errors import DatasetError
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["decode_mask", "encode_mask", "read_mask", "write_mask"]

_GREY_STEPS = {2: 85, 4: 17}
_PNG_HEADER_BYTES = 25


def read_mask(path: str | Path, *, classes: int | None = None) -> UInt8[ndarray, "h w"]:
    """Read a mask of class ids.

    Greyscale (1 to 16 bit) and palette images are read as ids; an EXIF orientation is not applied.

    Args:
        path: A PNG file.
        classes: Number of classes; with it, ids other than 0..classes-1 and 255 are refused.

    Raises:
        DatasetError: The file cannot be decoded, has several channels, or holds other ids.
    """
    return decode_mask(read_file(path), where=str(path), classes=classes)


def decode_mask(data: bytes, *, where: str, classes: int | None = None) -> UInt8[ndarray, "h w"]:
    """Decode a mask by the rules of :func:`read_mask`.

    Args:
        data: A PNG file.
        where: Name of the file, for messages.
        classes: As for :func:`read_mask`.

    Raises:
        DatasetError: As for :func:`read_mask`.
    """
    image = open_image(data, where)
    return _to_ids(image, data[:_PNG_HEADER_BYTES], classes, where)


def encode_mask(mask: UInt8[ndarray, "h w"], label_space: LabelSpace | None = None) -> bytes:
    """Return a mask as PNG bytes whose pixel values are the ids.

    Args:
        mask: Class ids, 255 = ignore.
        label_space: Its colours become the palette; without it the PNG is grey.

    Raises:
        DatasetError: An id is outside ``label_space``.
    """
    image = Image.fromarray(np.ascontiguousarray(mask))
    if label_space is not None:
        _check_ids(mask, len(label_space), "mask")
        table = np.zeros((256, 3), dtype=np.uint8)
        table[: len(label_space)] = label_space.palette
        table[IGNORE] = IGNORE_COLOR
        image.putpalette(table.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", bits=8)
    return buffer.getvalue()


def write_mask(
    path: str | Path, mask: UInt8[ndarray, "h w"], label_space: LabelSpace | None = None
) -> None:
    """Write the PNG of :func:`encode_mask`."""
    Path(path).write_bytes(encode_mask(mask, label_space))


def _check_ids(mask: UInt8[ndarray, "h w"], classes: int, where: str | Path) -> None:
    present = np.flatnonzero(np.bincount(mask.reshape(-1), minlength=256))
    wrong = [int(index) for index in present if classes <= index != IGNORE]
    if wrong:
        raise DatasetError(
            f"{where}: ids {wrong} outside the class list; expected 0 to {classes - 1} or {IGNORE}"
        )


def _to_ids(
    image: Image.Image, header: bytes, classes: int | None, where: str
) -> UInt8[ndarray, "h w"]:
    if image.format != "PNG":
        raise DatasetError(f"{where}: a {image.format} mask has no exact ids; expected a PNG")
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise DatasetError(
            f"{where}: a mask of mode {image.mode}; expected one channel of class ids "
            "(greyscale or palette), not colours"
        )
    ids = np.asarray(image)
    # Byte 8 of the IHDR chunk, always the first chunk, is the bit depth.
    if image.mode == "L" and (step := _GREY_STEPS.get(header[24])):
        ids = ids // step  # Pillow stretches 2 and 4 bit grey levels to 0..255
    if ids.dtype != np.uint8 and ids.size and (ids.min() < 0 or ids.max() > IGNORE):
        raise DatasetError(f"{where}: ids from {ids.min()} to {ids.max()}; expected 0 to {IGNORE}")
    ids = np.ascontiguousarray(ids, dtype=np.uint8)
    if classes is not None:
        _check_ids(ids, classes, where)
    return ids
