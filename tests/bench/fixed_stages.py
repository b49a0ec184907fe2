"""A stand-in for the generator: images of a fixed cost, from the mask alone.

Ray's workers import this by name.
"""

import time
from dataclasses import dataclass

import numpy as np

from loraseg.batch.synthesize.generate_stage import GeneratedImages, GeneratedMask, GeneratedUnit
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.synth.lineage import pair_id


@dataclass(frozen=True)
class FixedCost:
    """Makes stages that take ``seconds`` a mask and then return noise."""

    seconds: float

    def __call__(self, pinned):
        return _Stage(pinned, self.seconds)


class _Stage:
    def __init__(self, pinned, seconds):
        config = pinned.config
        self._pinned, self._seconds = pinned, seconds
        self._source = MaskSource(config.masks, config.classes, config.split)

    def __call__(self, part):
        return GeneratedUnit(part, tuple(self._drawn(entry, part) for entry in part.entries))

    def _drawn(self, entry, part):
        if entry.reason is not None:
            return GeneratedMask(entry, entry.reason)
        time.sleep(self._seconds)
        mask = self._source.read(entry.mask, classes=len(self._pinned.classes))
        random = np.random.default_rng(int(entry.mask_id[:15], 16))
        count = part.last - part.first + 1
        images = random.integers(0, 256, (count, *mask.shape, 3), dtype=np.uint8)
        lineages = tuple(self._lineage(entry, part.first + index) for index in range(count))
        return GeneratedMask(entry, GeneratedImages(mask, mask, images, lineages))

    def _lineage(self, entry, k):
        return {
            "pair_id": pair_id(entry.mask_id, k, "0" * 64, 0),
            "mask_id": entry.mask_id,
            "k": k,
            "seed": k,
            "prompt": "",
            "generator": "0" * 64,
            "adapters": [],
            "heads": [],
            "code_revision": "bench",
        }
