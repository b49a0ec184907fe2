"""Scenes and captions for pretraining the generator, rendered by several processes."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context

import numpy as np
from numpy import ndarray

from loraseg.miniature.models.generator.text import CaptionEncoder
from loraseg.miniature.world.domains import DOMAINS
from loraseg.miniature.world.render import presence, render
from loraseg.seeding import numpy_generator
from loraseg.tensor_types import Int, UInt8

__all__ = ["CAPTIONS_PER_SCENE", "CaptionedScenes", "draw_scenes"]

# Captions per scene; each training step uses one of them.
CAPTIONS_PER_SCENE = 6
_CHUNK_SIZE = 500


@dataclass(frozen=True, slots=True, eq=False)
class CaptionedScenes:
    """Images with masks, domains (indices into ``DOMAINS``) and captions (token ids)."""

    images: UInt8[ndarray, "n 64 64 3"]
    masks: UInt8[ndarray, "n 64 64"]
    domains: Int[ndarray, " n"]
    captions: Int[ndarray, "n captions l"]

    def __len__(self) -> int:
        return len(self.images)


def draw_scenes(per_domain: int, seed: int, *, processes: int = 1) -> CaptionedScenes:
    """Render scenes of every domain; they do not depend on the number of processes.

    Args:
        per_domain: Number of scenes per domain.
        seed: Seed of the scenes; the stream has the key "pretrain-generator", which nothing else
            uses.
        processes: Number of processes; each renders a scene in about a millisecond.
    """
    jobs = [
        (name, part, min(_CHUNK_SIZE, per_domain - part * _CHUNK_SIZE))
        for name in DOMAINS
        for part in range(-(-per_domain // _CHUNK_SIZE))
    ]
    context = get_context("spawn")
    if processes == 1:
        parts = [_draw_chunk(job, seed) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            parts = list(pool.map(_draw_chunk, jobs, repeat(seed)))
    images, masks, captions = (
        np.concatenate([part[index] for part in parts]) for index in range(3)
    )
    names = list(DOMAINS)
    domains = np.concatenate([np.full(count, names.index(name)) for name, _, count in jobs])
    return CaptionedScenes(images, masks, domains, captions)


_captions: list[CaptionEncoder] = []


def _draw_chunk(job: tuple[str, int, int], seed: int) -> tuple[ndarray, ndarray, ndarray]:
    name, part, count = job
    if not _captions:
        _captions.append(CaptionEncoder())
    images, masks = render(name, count, seed, "pretrain-generator", part)
    generator = numpy_generator(seed, "pretrain-generator", "captions", name, part)
    phrases = DOMAINS[name].phrases
    captions = [
        [_captions[0].draw(row, phrases, generator) for _ in range(CAPTIONS_PER_SCENE)]
        for row in presence(masks)
    ]
    return images, masks, np.array(captions)
