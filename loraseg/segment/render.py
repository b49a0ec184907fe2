"""Label maps as images: indexed PNG, overlay, legend."""

import numpy as np

from loraseg.data.drawing import colorize, draw_legend, legend_entries, pad_to_same_width
from loraseg.data.labels import LabelSpace
from loraseg.data.masks import encode_mask
from loraseg.errors import DatasetError
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = ["grey_png", "overlay", "overlay_with_legend"]


def grey_png(values: Float[ndarray, "h w"]) -> bytes:
    """Return a map such as confidence as an 8-bit grey PNG.

    Args:
        values: In [0, 1]; the grey level is 255 times the value, rounded half to even.

    Raises:
        DatasetError: A value is outside [0, 1] or NaN.
    """
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise DatasetError(f"map: values from {values.min()} to {values.max()}; expected 0 to 1")
    # The product is exact in float64, so that rounding happens only once.
    return encode_mask(np.rint(values * np.float64(255)).astype(np.uint8))


def overlay(
    image: UInt8[ndarray, "h w 3"],
    labels: UInt8[ndarray, "lh lw"],
    label_space: LabelSpace,
    *,
    opacity: float = 0.55,
) -> UInt8[ndarray, "h w 3"]:
    """Blend class colours into an image; ignored pixels show only the image.

    Args:
        image: RGB.
        labels: Class ids, 255 = ignore, at the size of the image.
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
    """Return the overlay with a legend of the classes that occur below, largest area first.

    The result is widened if a legend entry is wider than the image; the image is not resized.

    Raises:
        DatasetError: The sizes differ.
    """
    picture = overlay(image, labels, label_space, opacity=opacity)
    legend = draw_legend(legend_entries(labels, label_space), label_space, picture.shape[1])
    return np.concatenate(pad_to_same_width(picture, legend))
