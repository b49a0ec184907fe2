"""Painting of a chunk of images with an exact label for every pixel.

Each pixel stores the index of the part that was painted last; colours are looked up at the end.
Depth is the row of an object's lower edge: the larger the row, the nearer the object.
"""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

__all__ = [
    "CLASSES",
    "COLUMN",
    "ROW",
    "SIZE",
    "Canvas",
    "Scene",
    "class_id",
    "ellipse",
    "rectangle",
]

SIZE = 64
CLASSES = (
    "sky",
    "mountain",
    "building",
    "tree",
    "grass",
    "sidewalk",
    "road",
    "car",
    "bus",
    "person",
    "pole",
    "sign",
)
COLUMN = np.arange(SIZE, dtype=np.float32)[None, None, :]
ROW = np.arange(SIZE, dtype=np.float32)[None, :, None]


def class_id(name: str) -> int:
    """Return the id of a class in the masks.

    Raises:
        ValueError: The world has no such class.
    """
    return CLASSES.index(name)


def rectangle(left: ndarray, right: ndarray, top: ndarray, bottom: ndarray) -> ndarray:
    """Return (n, h, w) booleans inside boxes with (n,) edges; left and top inclusive."""
    left, right, top, bottom = (edge[:, None, None] for edge in (left, right, top, bottom))
    x, y = COLUMN, ROW
    return ((x >= left) & (x < right)) & ((y >= top) & (y < bottom))


def ellipse(x: ndarray, y: ndarray, radius_x: ndarray, radius_y: ndarray) -> ndarray:
    """Return (n, h, w) booleans inside ellipses with (n,) centres and radii."""
    x, y, radius_x, radius_y = (value[:, None, None] for value in (x, y, radius_x, radius_y))
    return ((COLUMN - x) / radius_x) ** 2 + ((ROW - y) / radius_y) ** 2 < 1


class Canvas:
    """Labels, parts and depth of ``count`` images, initially all class 0 (sky).

    Args:
        count: Number n of images.
        background: (n, 3) RGB colours in [0, 1].
    """

    def __init__(self, count: int, background: ndarray) -> None:
        shape = (count, SIZE, SIZE)
        self.labels = np.zeros(shape, np.uint8)
        self.depth = np.full(shape, -1, np.float32)
        self._parts = np.zeros(shape, np.uint8)
        self._colours = [background]
        self._lights: list[int] = []

    def paint(
        self,
        mask: ndarray,
        colour: ndarray,
        *,
        label: str | None = None,
        depth: ndarray | None = None,
        where: ndarray | None = None,
    ) -> ndarray:
        """Paint a part on every image and return the (n, h, w) pixels that were painted.

        Args:
            mask: (n, h, w) or (1, h, w) booleans, the pixels of the part.
            colour: (n, 3) RGB in [0, 1].
            label: Class of the pixels; None keeps the labels (windows, wheels, markings).
            depth: (n,) rows of the lower edge, or an (n, h, w) map. Nearer parts are not painted
                over. None paints over all parts and keeps the depth.
            where: (n,) booleans, the images that have the part; None for all.
        """
        if where is not None:
            mask = mask & where[:, None, None]
        if depth is not None:
            depth = depth[:, None, None] if depth.ndim == 1 else depth
            mask = mask & (depth >= self.depth)
        mask = np.broadcast_to(mask, self.labels.shape)
        self._colours.append(colour.astype(np.float32))
        np.putmask(self._parts, mask, len(self._colours) - 1)
        if label is not None:
            np.putmask(self.labels, mask, class_id(label))
            if depth is not None:
                np.copyto(self.depth, np.broadcast_to(depth, mask.shape), where=mask)
        return mask

    def add_light(self) -> None:
        """Mark the last part as a light, which stays bright at night."""
        self._lights.append(len(self._colours) - 1)

    def lights(self) -> ndarray:
        """Return the (n, h, w) pixels of all lights."""
        return np.isin(self._parts, np.array(self._lights, np.uint8))

    def colours(self) -> ndarray:
        """Return the (n, h, w, 3) images in [0, 1], without shading."""
        table = np.stack(self._colours, 1)
        return table[np.arange(len(table))[:, None, None], self._parts]


@dataclass(frozen=True)
class Scene:
    """A painted chunk of n scenes.

    Attributes:
        image: (n, h, w, 3) RGB in [0, 1].
        labels: (n, h, w) class ids, uint8.
        distance: (n, h, w) in [0, 1], 1 = far.
        lights: (n, h, w) booleans, the pixels of lights.
    """

    image: ndarray
    labels: ndarray
    distance: ndarray
    lights: ndarray
