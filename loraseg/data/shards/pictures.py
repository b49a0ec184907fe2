"""Images in a shard: label maps as PNG of 8 or 16 bits, and pairs as arrays."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from loraseg.data.labels import IGNORE, LabelSpace
from loraseg.data.masks import encode_mask
from loraseg.data.shards.schema import MAX_CLASSES, PairRow
from loraseg.data.untrusted_images import decode_image, image_size
from loraseg.errors import DatasetError, IntegrityError
from loraseg.image_limits import DECODE_ERRORS, MAX_PIXELS
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["decode_label", "decode_pair", "encode_label", "ignore_id"]

_UINT16_IGNORE = 65_535
# Type of the ids, and byte 24 of the PNG: bit depth, then 0 for grey, 3 for indexed.
_UINT8_PNG = ("uint8", (b"\x08\x00", b"\x08\x03"))
_UINT16_PNG = ("uint16", (b"\x10\x00",))


def ignore_id(classes: int) -> int:
    """Return the id of pixels without a class: 255, or 65535 with over 255 classes."""
    return IGNORE if classes <= IGNORE else _UINT16_IGNORE


def encode_label(labels: ndarray, classes: Sequence[str]) -> bytes:
    """Return a label map as PNG whose pixel values are the ids.

    Args:
        labels: Ids (h, w), uint8 or uint16; see :func:`ignore_id`.
        classes: Class names, whose colours become the palette of a PNG of 8 bits.

    Raises:
        DatasetError: An id is outside ``classes``, or the array is of another type.
    """
    if labels.ndim != 2 or labels.dtype.name not in ("uint8", "uint16") or not labels.size:
        raise DatasetError(f"label: {labels.dtype} {labels.shape}, expected uint8 or uint16 (h, w)")
    if len(classes) <= IGNORE and labels.dtype == np.uint8:
        return encode_mask(labels, LabelSpace(tuple(classes)))
    _check_ids(labels, len(classes))
    if len(classes) <= IGNORE:
        return encode_mask(labels.astype(np.uint8), LabelSpace(tuple(classes)))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint16)).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_label(data: bytes, classes: int) -> ndarray:
    """Return the ids (h, w) of a label map: uint8, or uint16 with over 255 classes.

    Args:
        data: PNG of one channel, 8 or 16 bits, grey or indexed, from an untrusted source.
        classes: Number of classes.

    Raises:
        DatasetError: It is something else, has too many pixels, or an id outside ``classes``.
    """
    dtype, forms = _UINT8_PNG if classes <= IGNORE else _UINT16_PNG
    width, height = image_size(data)
    if data[24:26] not in forms:
        raise DatasetError(f"the label is no PNG of one channel of {dtype}")
    if not 1 <= width * height <= MAX_PIXELS:
        raise DatasetError(f"the label has {width} x {height} pixels; up to {MAX_PIXELS} are taken")
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.size != (width, height):
            raise DatasetError("the label has two sizes")
        ids = np.array(image)
    except DatasetError:
        raise
    except DECODE_ERRORS as error:
        raise DatasetError("the label is broken or cut off") from error
    if ids.shape != (height, width):
        raise DatasetError(f"the label is no PNG of one channel of {dtype}")
    ids = ids.astype(dtype)
    _check_ids(ids, classes)
    return ids


def decode_pair(row: PairRow, classes: int, where: str) -> tuple[UInt8[ndarray, "h w 3"], ndarray]:
    """Return image and label (h, w) of a row that has both.

    Args:
        row: Any ``ok`` one, read with ``image``, ``label``, ``height`` and ``width``.
        classes: Number of classes.
        where: Name of the dataset, for messages.

    Raises:
        IntegrityError: An image is missing, broken, or its size differs from the row.
    """
    try:
        if row.image is None or row.label is None:
            raise DatasetError("no image or no label")
        for data in (row.image, row.label):
            width, height = image_size(data)
            if (height, width) != (row.height, row.width):
                raise DatasetError(f"{width} x {height} pixels, not {row.width} x {row.height}")
        image, label = decode_image(row.image), decode_label(row.label, classes)
        if image.shape[:2] != label.shape:  # an orientation in the file
            raise DatasetError("image and label have different sizes")
    except DatasetError as error:
        raise IntegrityError(f"{where}: pair {row.pair_id}: {error}") from error
    return image, label


def _check_ids(ids: ndarray, classes: int) -> None:
    if not 1 <= classes <= MAX_CLASSES:
        raise DatasetError(f"label: {classes} classes, expected 1 to {MAX_CLASSES}")
    wrong = ids[(ids >= classes) & (ids != ignore_id(classes))]
    if wrong.size:
        raise DatasetError(
            f"the label has id {int(wrong[0])}; expected 0 to {classes - 1} or {ignore_id(classes)}"
        )
