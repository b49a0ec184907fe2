"""Label maps as pictures: indexed PNG, overlay on the image, legend."""

import numpy as np

from loraseg.data.drawing import (
    colorize,
    draw_legend,
    encode_png,
    legend_entries,
    pad_to_same_width,
)
from loraseg.data.labels import LabelSpace
from loraseg.data.masks import encode_mask
from loraseg.errors import DatasetError
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = [
    "colorize",
    "encode_png",
    "grey_png",
    "overlay",
    "overlay_with_legend",
    "palette_png",
]


def palette_png(labels: UInt8[ndarray, "h w"], label_space: LabelSpace) -> bytes:
    """Return an indexed PNG: pixel values are class ids, the palette holds the class colours.

    Raises:
        DatasetError: An id is neither in the label space nor 255.
    """
    return encode_mask(labels, label_space)


def grey_png(values: Float[ndarray, "h w"]) -> bytes:
    """Return a map such as confidence as a grey PNG of 8 bits.

    Args:
        values: In [0, 1]; a grey level is 255 times that, rounded, halves to even.

    Raises:
        DatasetError: A value is outside [0, 1] or not a number.
    """
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise DatasetError(f"map: values from {values.min()} to {values.max()}; expected 0 to 1")
    # In float64 the product is exact, so that no half is made or lost by rounding twice.
    return encode_mask(np.rint(values * np.float64(255)).astype(np.uint8))


def overlay(
    image: UInt8[ndarray, "h w 3"],
    labels: UInt8[ndarray, "lh lw"],
    label_space: LabelSpace,
    *,
    opacity: float = 0.55,
) -> UInt8[ndarray, "h w 3"]:
    """Lay class colours over an image; ignored pixels show the image alone.

    Args:
        image: RGB.
        labels: Class ids, 255 = ignore, of the image's size.
        label_space: The classes.
        opacity: Share of the class colour, in [0, 1].

    Raises:
        DatasetError: The sizes differ.
    """
    if labels.shape != image.shape[:2]:
        raise DatasetError(f"label map {labels.shape} over an image of {image.shape[:2]}")
    share = np.where(labels < len(label_space), opacity, 0.0).astype(np.float32)[..., None]
    blended = image * (1 - share) + colorize(labels, label_space) * share
    return np.rint(blended).astype(np.uint8)


def overlay_with_legend(
    image: UInt8[ndarray, "h w 3"],
    labels: UInt8[ndarray, "lh lw"],
    label_space: LabelSpace,
    *,
    opacity: float = 0.55,
) -> UInt8[ndarray, "h2 w2 3"]:
    """Return the overlay with the classes that occur listed below it, largest area first.

    The picture becomes as wide as the longest entry needs; the image keeps its size.

    Raises:
        DatasetError: The sizes differ.
    """
    picture = overlay(image, labels, label_space, opacity=opacity)
    below = draw_legend(legend_entries(labels, label_space), label_space, picture.shape[1])
    return np.concatenate(pad_to_same_width(picture, below))
