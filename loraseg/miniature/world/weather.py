"""Effects of light, weather and cameras on the image of a scene. Masks do not change.

An effect takes a scene and the random generator of the chunk and returns a new (n, h, w, 3) image.
Its values may be outside [0, 1]; the renderer clips them once at the end.
"""

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from loraseg.miniature.world.batched_rng import BatchedRng
from loraseg.miniature.world.canvas import CLASSES, ROW, SIZE, Scene, class_id
from loraseg.tensor_types import Float

__all__ = [
    "Effect",
    "charcoal",
    "dim",
    "dusk",
    "fog",
    "grain",
    "negative",
    "night",
    "noir",
    "overcast",
    "pixelate",
    "rain",
    "sepia",
    "sketch",
    "snow",
    "thermal",
]

Effect = Callable[[Scene, BatchedRng], Float[ndarray, "n h w 3"]]

# Apparent temperature of each class, in [0, 1].
_WARMTH_BY_CLASS = {
    "sky": 0.05,
    "mountain": 0.2,
    "building": 0.44,
    "tree": 0.26,
    "grass": 0.34,
    "sidewalk": 0.5,
    "road": 0.58,
    "car": 0.75,
    "bus": 0.82,
    "person": 0.98,
    "pole": 0.14,
    "sign": 0.22,
}
_WARMTH = np.array([_WARMTH_BY_CLASS[name] for name in CLASSES], np.float32)


def grey(image: ndarray) -> ndarray:
    """Return the (n, h, w, 1) luminance of an (n, h, w, 3) image."""
    return (image @ np.array([0.3, 0.59, 0.11], np.float32))[..., None]


def blend(image: ndarray, other: ndarray, share: float | ndarray) -> ndarray:
    """Return ``(1 - share) * image + share * other``; shapes broadcast."""
    return image + (other - image) * np.asarray(share, np.float32)


def blur(image: ndarray) -> ndarray:
    """Smooth (n, h, w, c) images with (1, 2, 1) / 4 in both directions, edges repeated."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4


def _colour(red: float, green: float, blue: float) -> ndarray:
    return np.array([red, green, blue], np.float32)


def _class_mask(scene: Scene, *names: str) -> ndarray:
    return np.isin(scene.labels, [class_id(name) for name in names])[..., None]


def overcast(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
    """Desaturate the light and cover the sky with clouds."""
    image = blend(scene.image, grey(scene.image), 0.45) * np.float32(0.85)
    return np.where(_class_mask(scene, "sky"), _colour(0.7, 0.72, 0.74), image)


def fog(density: float) -> Effect:
    """Return an effect that veils distant objects; a density of about 1 hides the horizon."""

    def effect(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
        veil = rng.uniform(0.85, 1.15)[:, None, None] * np.float32(density) * scene.distance**1.5
        veil = np.clip(veil + np.float32(0.12 * density), 0, 0.97)[..., None]
        return blend(scene.image, _colour(0.78, 0.79, 0.8), veil)

    return effect


def rain(darkness: float, streaks: float) -> Effect:
    """Return an effect with dull light, reflections on the ground and slanted streaks."""

    def effect(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
        image = blend(scene.image, grey(scene.image), 0.5) * np.float32(darkness)
        haze = (scene.distance * np.float32(0.45))[..., None]
        image = blend(image, _colour(0.5, 0.53, 0.57), haze)
        mirrored = blend(image, image[:, ::-1], 0.3)
        image = np.where(_class_mask(scene, "road", "sidewalk"), mirrored, image)
        drops = rng.generator.random(scene.labels.shape, dtype=np.float32) < 0.025
        for step in (1, 2, 3):
            drops = drops | np.roll(drops, (1, -1 if step > 1 else 0), (1, 2))
        return image + drops[..., None] * np.float32(streaks)

    return effect


def snow(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
    """Cover the ground and upper edges with snow, whiten the sky and add flakes."""
    image = blend(scene.image, grey(scene.image), 0.35)
    white = blend(image, _colour(0.93, 0.94, 0.97), 0.85)
    image = np.where(_class_mask(scene, "grass", "sidewalk", "mountain"), white, image)
    holds = _class_mask(scene, "tree", "building")[..., 0]
    edge = np.zeros_like(holds)
    edge[:, 1:] = holds[:, 1:] & (scene.labels[:, :-1] != scene.labels[:, 1:])
    edge |= np.roll(edge, 1, 1) & holds
    image = np.where(edge[..., None], np.float32(0.95), image)
    image = np.where(
        _class_mask(scene, "road"), blend(image, _colour(0.85, 0.86, 0.9), 0.35), image
    )
    image = np.where(_class_mask(scene, "sky"), blend(image, _colour(0.82, 0.84, 0.87), 0.8), image)
    flakes = rng.generator.random(scene.labels.shape, dtype=np.float32) < 0.04
    return np.where(flakes[..., None], np.float32(1), image)


def dusk(tint: tuple[float, float, float], darkness: float) -> Effect:
    """Return an effect that tints the scene under a violet to orange sky."""

    def effect(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
        image = scene.image * _colour(*tint) * np.float32(darkness)
        height = np.clip(ROW[..., None] / (SIZE - 1) * np.float32(2.4), 0, 1)
        sky = blend(_colour(0.3, 0.25, 0.5), _colour(1.0, 0.55, 0.25), height) * np.float32(0.9)
        return np.where(_class_mask(scene, "sky"), sky, image)

    return effect


def night(brightness: float) -> Effect:
    """Return an effect that darkens to blue; lamps and lit windows stay bright and glow."""

    def effect(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
        image = scene.image * _colour(0.5, 0.55, 0.85) * np.float32(brightness)
        bright = (scene.image.max(-1, keepdims=True) > 0.75) & scene.lights[..., None]
        source = np.where(bright, scene.image, np.float32(0))
        image = np.maximum(image, source * np.float32(0.8)) + blur(blur(blur(source)))
        return image + rng.normal(image.shape, 0.02)

    return effect


def _edges(scene: Scene) -> ndarray:
    luminance = grey(scene.image)
    across = np.abs(np.diff(luminance, axis=2, append=luminance[:, :, -1:]))
    down = np.abs(np.diff(luminance, axis=1, append=luminance[:, -1:]))
    return np.clip((across + down) * 4, 0, 1)


def sketch(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
    """Draw pencil outlines on white paper."""
    tone = (grey(scene.image) - 0.5) * np.float32(0.12)
    lines = np.float32(0.97) - np.float32(0.85) * _edges(scene) + tone
    return np.repeat(lines, 3, -1) + rng.normal(scene.image.shape, 0.02)


def charcoal(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
    """Draw soft outlines and shading on grey paper."""
    tone = np.float32(0.25) * (grey(scene.image) - 0.5)
    return np.clip(sketch(scene, rng) * np.float32(0.62) + tone, 0, 1)


def sepia(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
    """Convert to brown monochrome with film grain."""
    tone = grey(scene.image) * np.float32(0.85) + np.float32(0.08)
    return tone * _colour(1.07, 0.88, 0.62) + rng.normal(scene.image.shape, 0.03)


def noir(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
    """Convert to black and white of high contrast with film grain."""
    tone = np.clip((grey(scene.image) - 0.5) * np.float32(1.5) + np.float32(0.45), 0, 1)
    return np.repeat(tone, 3, -1) + rng.normal(scene.image.shape, 0.03)


def thermal(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
    """Show the temperature of the classes instead of light, blurred and noisy."""
    tone = _WARMTH[scene.labels][..., None] + np.float32(0.25) * (grey(scene.image) - 0.5)
    tone = blur(tone) + rng.normal(tone.shape, 0.03)
    return np.repeat(np.clip(tone, 0, 1), 3, -1)


def dim(gain: float, offset: float) -> Effect:
    """Return an effect that computes ``gain * image + offset``."""

    def effect(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
        return scene.image * np.float32(gain) + np.float32(offset)

    return effect


def pixelate(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
    """Halve the resolution, quantise each channel to nine levels and add noise."""
    half = SIZE // 2
    image = scene.image.reshape(-1, half, 2, half, 2, 3).mean((2, 4))
    image = (np.round(image * 8) / 8).repeat(2, 1).repeat(2, 2).astype(np.float32)
    return image + rng.normal(image.shape, 0.03)


def grain(deviation: float) -> Effect:
    """Return an effect that adds sensor noise."""

    def effect(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
        return scene.image + rng.normal(scene.image.shape, deviation)

    return effect


def negative(scene: Scene, rng: BatchedRng) -> Float[ndarray, "n h w 3"]:
    """Invert every channel, as in a film negative."""
    return 1 - scene.image
