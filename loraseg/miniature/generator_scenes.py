"""Scenes and captions for pretraining the generator, drawn by many processes."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context

import numpy as np
from numpy import ndarray

from loraseg.miniature.domains import DOMAINS
from loraseg.miniature.generator_text import CaptionIds
from loraseg.miniature.world import presence, render
from loraseg.seeding import numpy_generator
from loraseg.tensor_types import Int, UInt8

__all__ = ["CAPTIONS", "Scenes", "draw_scenes"]

# Captions drawn for each scene; training picks one each time.
CAPTIONS = 6
_PART = 500


@dataclass(frozen=True, slots=True, eq=False)
class Scenes:
    """Pictures with their masks, domains (index into ``DOMAINS``) and captions."""

    images: UInt8[ndarray, "n 64 64 3"]
    masks: UInt8[ndarray, "n 64 64"]
    domains: Int[ndarray, " n"]
    captions: Int[ndarray, "n captions l"]

    def __len__(self) -> int:
        return len(self.images)


def draw_scenes(a_domain: int, seed: int, *, processes: int = 1) -> Scenes:
    """Draw scenes of every domain; the same whatever the number of processes.

    Args:
        a_domain: Scenes of each domain.
        seed: The user's seed; the stream is "pretrain-generator", which nothing else draws from.
        processes: How many work at once, a millisecond a scene each.
    """
    jobs = [
        (name, part, min(_PART, a_domain - part * _PART))
        for name in DOMAINS
        for part in range(-(-a_domain // _PART))
    ]
    context = get_context("spawn")
    if processes == 1:
        parts = [_draw(job, seed) for job in jobs]
    else:
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            parts = list(pool.map(_draw, jobs, repeat(seed)))
    images, masks, captions = (
        np.concatenate([part[index] for part in parts]) for index in range(3)
    )
    names = list(DOMAINS)
    domains = np.concatenate([np.full(count, names.index(name)) for name, _, count in jobs])
    return Scenes(images, masks, domains, captions)


_captions: list[CaptionIds] = []


def _draw(job: tuple[str, int, int], seed: int) -> tuple[ndarray, ndarray, ndarray]:
    name, part, count = job
    if not _captions:
        _captions.append(CaptionIds())
    images, masks = render(name, count, seed, "pretrain-generator", part)
    generator = numpy_generator(seed, "pretrain-generator", "captions", name, part)
    phrases = DOMAINS[name].phrases
    captions = [
        [_captions[0].draw(row, phrases, generator) for _ in range(CAPTIONS)]
        for row in presence(masks)
    ]
    return images, masks, np.array(captions)
