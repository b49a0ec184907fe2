"""Random draws for a chunk of scenes: every method returns one value per scene."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray

__all__ = ["BatchedRng", "hsv_to_rgb"]


class BatchedRng:
    """A numpy generator that draws float32 values for each of ``count`` scenes."""

    def __init__(self, generator: np.random.Generator, count: int) -> None:
        self.generator = generator
        self.count = count

    def uniform(self, low: float | int, high: float | int) -> ndarray:
        """Draw (n,) numbers in [low, high)."""
        return self.generator.uniform(low, high, self.count).astype(np.float32)

    def bernoulli(self, probability: float) -> ndarray:
        """Draw (n,) booleans that are true with the given probability."""
        return self.generator.random(self.count) < probability

    def sign(self) -> ndarray:
        """Draw (n,) values of -1 (left) or 1 (right)."""
        return np.where(self.bernoulli(0.5), 1.0, -1.0).astype(np.float32)

    def choice(self, options: Sequence[float | int]) -> ndarray:
        """Draw (n,) of the given numbers with equal probability."""
        return self.generator.choice(np.asarray(options, np.float32), self.count)

    def colour_near(self, base: Sequence[float], spread: float = 0.06) -> ndarray:
        """Draw (n, 3) RGB colours; hue and brightness differ from ``base`` by up to ``spread``."""
        hue = self.generator.uniform(-spread, spread, (self.count, 3))
        brightness = self.generator.uniform(-spread, spread, (self.count, 1))
        return np.clip(np.asarray(base) + hue + brightness, 0, 1).astype(np.float32)

    def normal(self, shape: tuple[int, ...], deviation: float) -> ndarray:
        """Draw normal noise of mean 0 and any shape, such as (n, h, w, 3)."""
        return self.generator.standard_normal(shape, dtype=np.float32) * np.float32(deviation)


def hsv_to_rgb(hue: ndarray, saturation: ndarray, value: ndarray) -> ndarray:
    """Convert (n,) hue, saturation and value in [0, 1] to (n, 3) RGB in [0, 1]."""
    sector = (np.array([5, 3, 1], np.float32) + 6 * hue[:, None]) % 6
    ramp = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return (value[:, None] * (1 - saturation[:, None] * ramp)).astype(np.float32)
