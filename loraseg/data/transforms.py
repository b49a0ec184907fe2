"""Joint random transforms of image and mask, as CAT-Seg and SemLA train (detectron2's).

Images are uint8 (h, w, 3), masks uint8 (h, w) of class ids. Geometric transforms apply to both;
masks are never interpolated.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from loraseg.data.labels import IGNORE
from loraseg.errors import ConfigError
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = [
    "AugmentConfig",
    "Jitter",
    "augment",
    "crop",
    "draw_jitter",
    "flip",
    "jitter_colors",
    "pad",
    "resize",
    "resize_shortest_edge",
    "shift_hue",
]

_PAD_LEVEL = 128

# SSD's ranges as the detection frameworks use them: brightness in grey levels, hue in degrees
# (OpenCV's 18 half degrees), each step taken with probability 1/2.
_BRIGHTNESS = 32.0
_FACTOR = (0.5, 1.5)
_HUE_DEGREES = 36.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """The training augmentation of CAT-Seg.

    Attributes:
        crop: Side of the square result, pixels.
        shortest_edge: Sizes that the shorter side is resized to, one drawn per image; empty keeps
            the image's own size.
        flip: Probability of a horizontal flip.
        jitter: Whether to jitter colours as SSD does.
    """

    crop: int = 384
    shortest_edge: tuple[int, ...] = (384,)
    flip: float = 0.5
    jitter: bool = True

    def __post_init__(self) -> None:
        if self.crop < 1 or any(edge < 1 for edge in self.shortest_edge):
            raise ConfigError(f"crop {self.crop}, shortest_edge {self.shortest_edge}: must be >= 1")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip {self.flip}: expected a probability in [0, 1]")


def augment(
    image: UInt8[ndarray, "h w 3"],
    mask: UInt8[ndarray, "h w"],
    config: AugmentConfig,
    generator: np.random.Generator,
) -> tuple[UInt8[ndarray, "s s 3"], UInt8[ndarray, "s s"]]:
    """Resize the shorter side, crop, jitter colours, flip and pad (128 and ignore) to the crop.

    The same generator state gives the same result.
    """
    if config.shortest_edge:
        edge = int(generator.choice(config.shortest_edge))
        image, mask = resize_shortest_edge(image, mask, edge)
    height, width = mask.shape
    top = int(generator.integers(0, max(height - config.crop, 0) + 1))
    left = int(generator.integers(0, max(width - config.crop, 0) + 1))
    image, mask = crop(image, mask, top, left, config.crop)
    if config.jitter:
        image = jitter_colors(image, draw_jitter(generator))
    if generator.random() < config.flip:
        image, mask = flip(image, mask)
    return pad(image, mask, config.crop)


def resize(
    image: UInt8[ndarray, "h w 3"], mask: UInt8[ndarray, "h w"], size: tuple[int, int]
) -> tuple[UInt8[ndarray, "th tw 3"], UInt8[ndarray, "th tw"]]:
    """Resize to ``size`` = (height, width): bilinear (smoothed when shrinking), mask nearest."""
    if mask.shape == size:
        return image, mask
    to = (size[1], size[0])
    return (
        np.array(Image.fromarray(image).resize(to, Image.Resampling.BILINEAR)),
        np.array(Image.fromarray(mask).resize(to, Image.Resampling.NEAREST)),
    )


def resize_shortest_edge(
    image: UInt8[ndarray, "h w 3"], mask: UInt8[ndarray, "h w"], edge: int
) -> tuple[UInt8[ndarray, "th tw 3"], UInt8[ndarray, "th tw"]]:
    """Resize so that the shorter side becomes ``edge``, keeping the aspect ratio."""
    height, width = mask.shape
    shortest = min(height, width)
    size = (round(height * edge / shortest), round(width * edge / shortest))
    return resize(image, mask, size)


def crop(
    image: UInt8[ndarray, "h w 3"], mask: UInt8[ndarray, "h w"], top: int, left: int, side: int
) -> tuple[UInt8[ndarray, "th tw 3"], UInt8[ndarray, "th tw"]]:
    """Cut out rows from ``top`` and columns from ``left``, at most ``side`` of each."""
    rows, columns = slice(top, top + side), slice(left, left + side)
    return image[rows, columns], mask[rows, columns]


def flip(
    image: UInt8[ndarray, "h w 3"], mask: UInt8[ndarray, "h w"]
) -> tuple[UInt8[ndarray, "h w 3"], UInt8[ndarray, "h w"]]:
    """Mirror left and right."""
    return np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])


def pad(
    image: UInt8[ndarray, "h w 3"], mask: UInt8[ndarray, "h w"], side: int
) -> tuple[UInt8[ndarray, "th tw 3"], UInt8[ndarray, "th tw"]]:
    """Extend to at least ``side`` by ``side``, below and to the right, by 128 and by ignore."""
    rows, columns = (max(side - length, 0) for length in mask.shape)
    margin = ((0, rows), (0, columns))
    return (
        np.pad(image, (*margin, (0, 0)), constant_values=_PAD_LEVEL),
        np.pad(mask, margin, constant_values=IGNORE),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Jitter:
    """Strengths of the colour jitter; the defaults change nothing.

    Attributes:
        brightness: Added to all levels, in grey levels.
        contrast: Factor of all levels.
        saturation: Factor of the S of HSV, which stops at 1.
        hue_degrees: Turn of the H of HSV.
        contrast_first: Whether contrast comes before saturation and hue, or after them.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue_degrees: float = 0.0
    contrast_first: bool = True


def draw_jitter(generator: np.random.Generator) -> Jitter:
    """Draw strengths in SSD's ranges; each step is left out with probability 1/2."""
    taken = generator.random(4) < 0.5
    brightness = generator.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    contrast, saturation = generator.uniform(*_FACTOR, size=2)
    degrees = generator.uniform(-_HUE_DEGREES, _HUE_DEGREES)
    return Jitter(
        brightness=float(brightness) if taken[0] else 0.0,
        contrast=float(contrast) if taken[1] else 1.0,
        saturation=float(saturation) if taken[2] else 1.0,
        hue_degrees=float(degrees) if taken[3] else 0.0,
        contrast_first=bool(generator.random() < 0.5),
    )


def jitter_colors(image: UInt8[ndarray, "h w 3"], jitter: Jitter) -> UInt8[ndarray, "h w 3"]:
    """Change brightness, contrast, saturation and hue; levels are clipped at every step.

    Rounding happens once, at the end.
    """
    levels = image.astype(np.float32)
    levels = np.clip(levels + jitter.brightness, 0, 255)
    if jitter.contrast_first:
        levels = np.clip(levels * jitter.contrast, 0, 255)
    if jitter.saturation != 1:
        levels = _scale_saturation(levels, jitter.saturation)
    if jitter.hue_degrees:
        levels = shift_hue(levels, jitter.hue_degrees)
    if not jitter.contrast_first:
        levels = np.clip(levels * jitter.contrast, 0, 255)
    return np.rint(levels).astype(np.uint8)


def shift_hue(levels: Float[ndarray, "h w 3"], degrees: float) -> Float[ndarray, "h w 3"]:
    """Turn the hue of RGB levels, keeping the value and saturation of HSV."""
    value = levels.max(axis=2)
    chroma = value - levels.min(axis=2)
    red, green, blue = levels[..., 0], levels[..., 1], levels[..., 2]
    safe = np.where(chroma > 0, chroma, 1)
    sextant = np.select(
        [value == red, value == green],
        [(green - blue) / safe, 2 + (blue - red) / safe],
        4 + (red - green) / safe,
    )
    turned = []
    for offset in (5, 3, 1):  # the closed form of HSV to RGB, one channel at a time
        k = (offset + sextant + degrees / 60) % 6
        turned.append(value - chroma * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(turned, axis=2)


def _scale_saturation(levels: Float[ndarray, "h w 3"], factor: float) -> Float[ndarray, "h w 3"]:
    """Scale the S of HSV, at most to 1: every channel's distance below the largest one."""
    value = levels.max(axis=2, keepdims=True)
    chroma = value - levels.min(axis=2, keepdims=True)
    saturation = chroma / np.maximum(value, 1e-6)
    scale = np.minimum(factor, 1 / np.maximum(saturation, 1e-6))
    return value - (value - levels) * scale
