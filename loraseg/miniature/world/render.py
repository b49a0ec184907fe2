"""Rendering of the miniature world: images of a domain with exact masks, from a seed."""

import numpy as np
from numpy import ndarray

from loraseg.errors import ConfigError
from loraseg.miniature.world.batched_rng import BatchedRng
from loraseg.miniature.world.canvas import CLASSES, SIZE, Scene
from loraseg.miniature.world.domains import BASE_DOMAINS, DOMAINS, WorldDomain
from loraseg.miniature.world.street import draw_street
from loraseg.miniature.world.top_down import draw_top_down
from loraseg.seeding import numpy_generator
from loraseg.tensor_types import Bool, UInt8

__all__ = ["BASE_DOMAINS", "CLASSES", "DOMAINS", "presence", "render"]

# Scenes per chunk. Each chunk has its own random stream and is always rendered completely, so an
# image does not depend on the number of requested images.
_CHUNK = 32
# Surface roughness of each class, in class order.
_TEXTURE = np.array(
    [0.006, 0.012, 0.012, 0.03, 0.025, 0.012, 0.01, 0.008, 0.008, 0.008, 0.006, 0.006], np.float32
)
_RENDERERS = {"street": draw_street, "overhead": draw_top_down}


def render(
    domain: str, count: int, seed: int, *keys: str | int
) -> tuple[UInt8[ndarray, "n 64 64 3"], UInt8[ndarray, "n 64 64"]]:
    """Render the first ``count`` scenes of a random stream, at about a millisecond per scene.

    Args:
        domain: A key of ``DOMAINS``.
        count: Number of scenes; image i is the same for every count above i.
        seed: Seed of the scenes.
        keys: Keys of the stream, such as a split; other keys give other scenes.

    Returns:
        RGB images, and their masks with class ids in [0, 12).

    Raises:
        ConfigError: The domain is unknown, or the count is negative.
    """
    if domain not in DOMAINS:
        raise ConfigError(f"unknown domain {domain!r} (known: {', '.join(DOMAINS)})")
    if count < 0:
        raise ConfigError(f"count {count}: expected 0 or more scenes of {domain!r}")
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    masks = np.empty((count, SIZE, SIZE), np.uint8)
    for start in range(0, count, _CHUNK):
        stream = numpy_generator(seed, "world", domain, *keys, start // _CHUNK)
        image, mask = _render_chunk(DOMAINS[domain], stream)
        images[start : start + _CHUNK] = image[: count - start]
        masks[start : start + _CHUNK] = mask[: count - start]
    return images, masks


def presence(masks: UInt8[ndarray, "n h w"], threshold: int = 12) -> Bool[ndarray, "n c"]:
    """Return whether each class covers at least ``threshold`` pixels of each mask."""
    counts = [(masks == label).sum((1, 2)) for label in range(len(CLASSES))]
    return np.stack(counts, 1) >= threshold


def _render_chunk(domain: WorldDomain, stream: np.random.Generator) -> tuple[ndarray, ndarray]:
    rng = BatchedRng(stream, _CHUNK)
    scene = _RENDERERS[domain.view](rng, domain.palette)
    roughness = rng.normal(scene.labels.shape, 1.0) * _TEXTURE[scene.labels]
    image = scene.image + roughness[..., None]
    for effect in domain.effects:
        image = effect(Scene(image, scene.labels, scene.distance, scene.lights), rng)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), scene.labels
