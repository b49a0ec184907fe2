"""Training batches for the miniature CLIP: crops of one size with labels and captions."""

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
# Crop side in patches -> (images, images with captions) per batch, at about equal cost.
_BATCH_SIZES = {4: (320, 96), 8: (128, 64), 16: (40, 40)}
# Smallest number of the 16 pixels of a patch that must have its class.
_MIN_CLASS_PIXELS = 7


@dataclass(frozen=True)
class ClipBatch:
    """A batch of crops.

    Attributes:
        images: (b, 3, s, s), normalised.
        offset: Row and column of the crop in patches.
        present: (b, c) booleans, the classes in each crop.
        domains: (b,) indices into ``DOMAINS``.
        patch_labels: (b, g, g) class ids; ``NO_LABEL`` where no class has a clear majority and in
            domains outside ``LABELLED_DOMAINS``.
        captions: Captions of the first images of the batch.
    """

    images: Tensor
    offset: tuple[int, int]
    present: ndarray
    domains: ndarray
    patch_labels: ndarray
    captions: list[str]


class ScenePool:
    """Rendered scenes of all domains, the same number of each.

    Attributes:
        scenes: Number of scenes per domain.
        images: (n, 64, 64, 3) uint8, ordered by domain.
        masks: (n, 64, 64) class ids.
        patch_labels: (n, g, g) class ids or ``NO_LABEL``.
    """

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
    """Return the shares of 16, 32 and 64 pixel crops at a progress of the training in [0, 1].

    Objects are learned on crops; whole images come last, since the model is used on them.
    """
    if progress < 0.45:
        return (0.3, 0.45, 0.25)
    return (0.15, 0.4, 0.45) if progress < 0.85 else (0.0, 0.0, 1.0)


def draw_batch(pool: ScenePool, progress: float, generator: np.random.Generator) -> ClipBatch:
    """Draw a batch.

    In 40 % of the batches all images come from two domains, so that the domain identifies few of
    them and the content must be used.
    """
    side = int(generator.choice(list(_BATCH_SIZES), p=crop_size_shares(progress)))
    size, captioned = _BATCH_SIZES[side]
    candidates = _draw_domains(progress, generator)
    domains = generator.choice(candidates, size)
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
