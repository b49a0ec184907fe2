"""A chunk of pictures painted together, with an exact label for every pixel.

A pixel keeps the number of the part that was painted last on it; colours are looked up at the end.
Depth is the row of an object's foot: the lower the foot stands, the nearer the object.
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
    """Return the number that masks use for a class of the world."""
    return CLASSES.index(name)


def rectangle(left: ndarray, right: ndarray, top: ndarray, bottom: ndarray) -> ndarray:
    """Return (n, h, w) booleans inside each scene's box; left and top inclusive."""
    left, right, top, bottom = (edge[:, None, None] for edge in (left, right, top, bottom))
    x, y = COLUMN, ROW
    return ((x >= left) & (x < right)) & ((y >= top) & (y < bottom))


def ellipse(x: ndarray, y: ndarray, radius_x: ndarray, radius_y: ndarray) -> ndarray:
    """Return (n, h, w) booleans inside each scene's ellipse."""
    x, y, radius_x, radius_y = (value[:, None, None] for value in (x, y, radius_x, radius_y))
    return ((COLUMN - x) / radius_x) ** 2 + ((ROW - y) / radius_y) ** 2 < 1


class Canvas:
    """Labels, parts and depth of ``count`` pictures, all of class 0 (sky) at first."""

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
        """Paint a part on every picture and return the (n, h, w) pixels that it got.

        Args:
            mask: (n, h, w) or (1, h, w) shape of the part.
            colour: (n, 3) in [0, 1].
            label: The class of the pixels; None keeps theirs (windows, wheels, markings).
            depth: (n,) foot rows or an (n, h, w) map. Nearer parts are not painted over. None
                paints over everything and leaves the depth alone.
            where: (n,) pictures that have the part at all.
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
        """Declare the last part a light, which stays bright at night."""
        self._lights.append(len(self._colours) - 1)

    def lights(self) -> ndarray:
        """Return the (n, h, w) pixels of all lights."""
        return np.isin(self._parts, np.array(self._lights, np.uint8))

    def colours(self) -> ndarray:
        """Return the (n, h, w, 3) flat-coloured pictures in [0, 1]."""
        table = np.stack(self._colours, 1)
        return table[np.arange(len(table))[:, None, None], self._parts]


@dataclass(frozen=True)
class Scene:
    """A painted chunk: pictures in [0, 1], class ids, distance in [0, 1] (1 = far), lights."""

    image: ndarray
    labels: ndarray
    distance: ndarray
    lights: ndarray
