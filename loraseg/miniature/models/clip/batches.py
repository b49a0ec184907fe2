"""Training batches for the miniature CLIP: crops of one size, with what is in them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from loraseg.miniature.models.clip.model import CLIP_CONFIG, normalise
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.captions import caption
from loraseg.miniature.world.domains import DOMAINS, LABELLED_DOMAINS
from loraseg.miniature.world.render import presence, render

__all__ = ["NO_LABEL", "ClipBatch", "ScenePool", "crop_size_shares", "draw_batch"]

NO_LABEL = 255
_PATCH: int = CLIP_CONFIG["vision_cfg"]["patch_size"]
_GRID: int = CLIP_CONFIG["vision_cfg"]["image_size"] // _PATCH
# Crop side in patches -> pictures in a batch, captioned pictures in it. About equal cost.
_BATCH_SIZES = {4: (320, 96), 8: (128, 64), 16: (40, 40)}
# A patch counts as showing a class from this many of its 16 pixels.
_MIN_CLASS_PIXELS = 7


@dataclass(frozen=True)
class ClipBatch:
    """Pictures (b, 3, s, s), offset in patches, (b, c) presence, domain and (b, g, g) patch labels.

    ``patch_labels`` is ``NO_LABEL`` where no class has a clear majority and in every domain outside
    ``LABELLED_DOMAINS``.
    """

    images: Tensor
    offset: tuple[int, int]
    present: ndarray
    domains: ndarray
    patch_labels: ndarray
    captions: list[str]


class ScenePool:
    """Rendered scenes of all domains, equally many of each."""

    def __init__(self, scenes: int, seed: int) -> None:
        rendered = [render(domain, scenes, seed, "pretrain-clip") for domain in DOMAINS]
        self.scenes = scenes
        self.images = np.concatenate([images for images, _ in rendered])
        self.masks = np.concatenate([masks for _, masks in rendered])
        self.patch_labels = np.concatenate(
            [
                _patch_labels(masks)
                if domain in LABELLED_DOMAINS
                else np.full((scenes, _GRID, _GRID), NO_LABEL, np.uint8)
                for domain, (_, masks) in zip(DOMAINS, rendered, strict=True)
            ]
        )


def crop_size_shares(progress: float) -> tuple[float, ...]:
    """Return the shares of 16, 32 and 64 pixel crops at a point in [0, 1] of the training.

    Objects are learnt on crops; whole pictures come last, as the model is used on them.
    """
    if progress < 0.45:
        return (0.3, 0.45, 0.25)
    return (0.15, 0.4, 0.45) if progress < 0.85 else (0.0, 0.0, 1.0)


def draw_batch(pool: ScenePool, progress: float, generator: np.random.Generator) -> ClipBatch:
    """Draw a batch; in two of five all pictures come from two domains, so content must tell."""
    side = int(generator.choice(list(_BATCH_SIZES), p=crop_size_shares(progress)))
    size, captioned = _BATCH_SIZES[side]
    chosen = _draw_domains(progress, generator)
    domains = generator.choice(chosen, size)
    rows = domains * pool.scenes + generator.integers(0, pool.scenes, size)
    top, left = (int(value) for value in generator.integers(0, _GRID - side + 1, 2))
    pixels = np.s_[:, top * _PATCH : (top + side) * _PATCH, left * _PATCH : (left + side) * _PATCH]
    images, masks = pool.images[rows][pixels], pool.masks[rows][pixels]
    labels = pool.patch_labels[rows][:, top : top + side, left : left + side]
    present = presence(masks)
    if generator.random() < 0.5:
        images, labels = images[:, :, ::-1], labels[:, :, ::-1]
    names = list(DOMAINS)
    captions = [
        caption(present[row], DOMAINS[names[domains[row]]].phrases, generator)
        for row in range(captioned)
    ]
    tensor = normalise(torch.from_numpy(np.ascontiguousarray(images)))
    return ClipBatch(tensor, (top, left), present, domains, labels, captions)


def _draw_domains(progress: float, generator: np.random.Generator) -> ndarray:
    names = list(DOMAINS)
    early = [names.index(name) for name in LABELLED_DOMAINS]
    pool = np.array(early if progress < 0.15 else range(len(names)))
    return generator.choice(pool, 2, replace=False) if generator.random() < 0.4 else pool


def _patch_labels(masks: ndarray) -> ndarray:
    blocks = masks.reshape(len(masks), _GRID, _PATCH, _GRID, _PATCH)
    counts = np.stack([(blocks == label).sum((2, 4)) for label in range(len(CLASSES))], -1)
    labels = counts.argmax(-1).astype(np.uint8)
    labels[counts.max(-1) < _MIN_CLASS_PIXELS] = NO_LABEL
    return labels
