"""One colour per class name, the same in every data set, picture and report."""

import colorsys
import hashlib
from collections.abc import Sequence

import numpy as np

from loraseg.tensor_types import UInt8, ndarray

__all__ = ["IGNORE_COLOR", "class_colors"]

IGNORE_COLOR = (245, 245, 245)

# Readers of driving papers know the Cityscapes colours; classes of other worlds join below.
_FIXED_COLORS = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "pavement": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "tree": (107, 142, 35),
    "terrain": (152, 251, 152),
    "grass": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
    "bicyclist": (255, 0, 0),
    "background": (40, 44, 52),
    "soil": (133, 94, 66),
    "crop": (60, 179, 75),
    "weed": (230, 110, 30),
    "door": (145, 80, 40),
    "window": (60, 190, 200),
}


def class_colors(names: Sequence[str]) -> UInt8[ndarray, "n 3"]:
    """Return one RGB colour per name; no two names of the list share one.

    Well-known names have fixed colours, any other name one derived from its hash, so a class
    keeps its colour when the list around it changes (but for the rare clash, where the later name
    of the list moves on).

    Args:
        names: Class names; at most 255.
    """
    taken: set[tuple[int, int, int]] = {IGNORE_COLOR}
    colors: list[tuple[int, int, int]] = []
    for name in names:
        color = _FIXED_COLORS.get(name.casefold())
        attempt = 0
        while color is None or color in taken:
            color = _hashed_color(name.casefold(), attempt)
            attempt += 1
        taken.add(color)
        colors.append(color)
    return np.array(colors, dtype=np.uint8).reshape(-1, 3)


def _hashed_color(name: str, attempt: int) -> tuple[int, int, int]:
    """Return a colour of middling lightness, so that white and black text both show on it."""
    hue, saturation, value = hashlib.sha256(f"{attempt}:{name}".encode()).digest()[:3]
    rgb = colorsys.hsv_to_rgb(hue / 256, 0.45 + saturation / 512, 0.5 + value / 640)
    red, green, blue = (round(255 * channel) for channel in rgb)
    return red, green, blue
