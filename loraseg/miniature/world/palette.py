"""Colours of the objects of a domain."""

from dataclasses import dataclass

from numpy import ndarray

from loraseg.miniature.world.batched_rng import BatchedRng, hsv_to_rgb

__all__ = ["Palette", "random_building_colour", "random_vehicle_colour"]

Rgb = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Mean RGB colours in [0, 1], and the share of buildings with lit windows."""

    sky: Rgb = (0.5, 0.7, 0.93)
    mountain: Rgb = (0.45, 0.5, 0.6)
    grass: Rgb = (0.42, 0.62, 0.3)
    sidewalk: Rgb = (0.68, 0.66, 0.63)
    road: Rgb = (0.34, 0.34, 0.36)
    trunk: Rgb = (0.36, 0.25, 0.16)
    tree: Rgb = (0.17, 0.45, 0.18)
    pole: Rgb = (0.22, 0.22, 0.25)
    lit_windows: float = 0.0


def random_building_colour(rng: BatchedRng) -> ndarray:
    """Draw (n, 3) RGB wall colours: brick, ochre, sand or slate."""
    hue = rng.choice([0.03, 0.08, 0.1, 0.6]) + rng.uniform(-0.02, 0.02)
    return hsv_to_rgb(hue % 1, rng.uniform(0.08, 0.5), rng.uniform(0.45, 0.8))


def random_vehicle_colour(rng: BatchedRng, *, bus: bool = False) -> ndarray:
    """Draw (n, 3) RGB vehicle colours; a bus has one of four hues."""
    if bus:
        hue = rng.choice([0.12, 0.0, 0.58, 0.35])
        return hsv_to_rgb(hue, rng.uniform(0.6, 0.9), rng.uniform(0.6, 0.9))
    return hsv_to_rgb(rng.uniform(0, 1), rng.uniform(0.2, 0.95), rng.uniform(0.35, 0.95))
