"""A stand-in for the generator: noise images at a fixed cost. Ray's workers import it by name."""

import time
from dataclasses import dataclass

import numpy as np

from loraseg.batch.synthesize.generate_stage import GeneratedMask, GeneratedUnit
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.synth.lineage import pair_id


@dataclass(frozen=True)
class FixedCost:
    """Builds steps that take ``seconds`` per mask and return noise."""

    seconds: float

    def __call__(self, state):
        return _GenerateNoise(state, self.seconds)


class _GenerateNoise:
    def __init__(self, state, seconds):
        self._seconds = seconds
        self._source = MaskSource(state.config.masks, state.classes, state.config.split)

    def __call__(self, unit):
        results = (self._generate(scanned, unit) for scanned in unit.conditions)
        return GeneratedUnit(unit, tuple(results))

    def _generate(self, scanned, unit):
        if scanned.reason is not None:
            return scanned.reason
        time.sleep(self._seconds)
        mask = self._source.read(scanned.ref)
        random = np.random.default_rng(int(scanned.condition_id[:15], 16))
        numbers = range(unit.first_image, unit.last_image + 1)
        images = random.integers(0, 256, (len(numbers), *mask.shape, 3), dtype=np.uint8)
        lineages = tuple(self._lineage(scanned.condition_id, k) for k in numbers)
        return GeneratedMask(mask, mask, images, lineages)

    def _lineage(self, mask_id, k):
        return {
            "pair_id": pair_id(mask_id, k, "0" * 64, 0),
            "mask_id": mask_id,
            "k": k,
            "seed": k,
            "prompt": "",
            "generator": "0" * 64,
            "adapters": [],
            "heads": [],
            "code_revision": "bench",
        }
