"""The first stage of a unit: generate the images of its masks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from loraseg.batch.synthesize.conditions import ScannedCondition
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.batch.synthesize.models import load_generator
from loraseg.batch.synthesize.plan import SynthesisWorkUnit
from loraseg.batch.synthesize.state import SynthesisRunState
from loraseg.errors import DatasetError, StageError
from loraseg.synth.generator import GeneratedImage, Generator
from loraseg.synth.lineage import mask_digest
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["GenerateStage", "GeneratedMask", "GeneratedUnit"]

# The attention of the generator takes gigabytes for an image of this size.
_MAX_PIXELS = 4 * 1024**2


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedMask:
    """A mask with its images.

    Attributes:
        mask: Class ids or 255, at the size of the images.
        label: The mask, with 255 also where a class had no room in the prompt.
        images: RGB images ``first_image`` to ``last_image`` of the unit.
        lineages: Lineage of each image as plain JSON values.
    """

    mask: UInt8[ndarray, "h w"]
    label: UInt8[ndarray, "h w"]
    images: UInt8[ndarray, "k h w 3"]
    lineages: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedUnit:
    """A unit with the images of its conditions.

    Attributes:
        unit: The unit.
        results: For each condition its images, or the reason why it has none.
    """

    unit: SynthesisWorkUnit
    results: tuple[GeneratedMask | str, ...]


class GenerateStage:
    """Generates images. Loads the generator for the first unit; one thread at a time."""

    def __init__(self, state: SynthesisRunState) -> None:
        """Open the source of masks; the generator is loaded with the first unit."""
        self._state = state
        config = state.config
        self._source = MaskSource(config.masks, state.classes, config.split, config.sampling.size)

    def __call__(self, unit: SynthesisWorkUnit) -> GeneratedUnit:
        """Generate the images of each usable mask.

        Raises:
            StageError: A mask changed since it was scanned, or memory is exhausted.
            LorasegError: As raised by library, store and models.
        """
        results = (self._generate(scanned, unit) for scanned in unit.conditions)
        return GeneratedUnit(unit, tuple(results))

    @cached_property
    def _generator(self) -> Generator:
        return load_generator(self._state)

    def _generate(self, scanned: ScannedCondition, unit: SynthesisWorkUnit) -> GeneratedMask | str:
        if scanned.reason is not None:
            return scanned.reason
        mask = self._read_mask(scanned)
        if mask.size > _MAX_PIXELS:
            height, width = mask.shape
            return (
                f"{height}x{width} pixels, expected at most {_MAX_PIXELS} in all; sampling.size "
                "makes images of another size"
            )
        try:
            # One mask per call: its images are one batch, whatever else the unit holds.
            masks = [(scanned.ref.name, mask)]
            generated = list(self._generator.generate(masks, first=unit.first_image))
        except DatasetError as error:
            return str(error)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise StageError(
                f"mask {scanned.ref.name!r}: not enough memory for images of {mask.shape[0]}x"
                f"{mask.shape[1]}; set a smaller sampling.batch or sampling.size: {error}"
            ) from error
        images = np.stack([image.image for image in generated])
        lineages = tuple(_lineage(image, unit) for image in generated)
        return GeneratedMask(mask, generated[0].label, images, lineages)

    def _read_mask(self, scanned: ScannedCondition) -> UInt8[ndarray, "h w"]:
        """Return a mask at the size of its images.

        The mask was readable when the masks were scanned. A failure now means that the file changed
        during the run, so it is an error of the run and not a ``bad_mask`` row, which would stay:
        the next run scans the masks again.

        Raises:
            StageError: The mask changed.
            StoreError: The store cannot be read.
        """
        try:
            mask = self._source.read(scanned.ref)
        except DatasetError as error:
            raise StageError(f"{error}; it changed during the run, run again") from error
        if mask_digest(mask) != scanned.condition_id:
            raise StageError(f"mask {scanned.ref.name!r} changed during the run; run again")
        return mask


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Return whether memory is exhausted; torch has no error class for it on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
        error
    )


def _lineage(generated: GeneratedImage, unit: SynthesisWorkUnit) -> dict[str, Any]:
    return {**generated.lineage.to_json(), "batch": [unit.first_image, unit.last_image]}
