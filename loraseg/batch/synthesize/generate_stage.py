"""The first stage of a part of the work: draw the images of its masks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.batch.synthesize.models import load_generator
from loraseg.batch.synthesize.plan import MaskWorkUnit, ScannedMask
from loraseg.batch.synthesize.state import SynthesisRunState
from loraseg.errors import DatasetError, LorasegError, StageError
from loraseg.synth.generator import GeneratedImage, Generator
from loraseg.synth.lineage import mask_digest
from loraseg.synth.sizes import resize_mask
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["GenerateStage", "GeneratedImages", "GeneratedMask", "GeneratedUnit"]

# Attention in full needs gigabytes for an image of this size, whatever the machine.
_MAX_PIXELS = 4 * 1024**2


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedImages:
    """The images of a mask.

    Attributes:
        mask: At the size of the images.
        label: The mask, 255 also where a class had no room in the prompt.
        images: RGB, images ``first`` to ``last`` of the part.
        lineages: JSON of each image.
    """

    mask: UInt8[ndarray, "h w"]
    label: UInt8[ndarray, "h w"]
    images: UInt8[ndarray, "k h w 3"]
    lineages: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedMask:
    """A mask as planned, with its images or the reason why it has none."""

    scanned: ScannedMask
    result: GeneratedImages | str


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedUnit:
    """A part with the images of its masks, or what ended it."""

    unit: MaskWorkUnit
    masks: tuple[GeneratedMask, ...] = ()
    error: LorasegError | None = None


class GenerateStage:
    """The first stage. Loads the generator for the first part; one thread at a time."""

    def __init__(self, state: SynthesisRunState) -> None:
        """Take the job; nothing is loaded yet, so that a failure to is an outcome."""
        self._state = state
        config = state.config
        self._source = MaskSource(config.masks, config.classes, config.split)

    def __call__(self, part: MaskWorkUnit) -> GeneratedUnit:
        """Draw the images of each mask that can be drawn."""
        try:
            return GeneratedUnit(part, tuple(self._generate(entry, part) for entry in part.masks))
        except LorasegError as error:
            return GeneratedUnit(part, error=error)

    @cached_property
    def _generator(self) -> Generator:
        return load_generator(self._state)

    def _generate(self, scanned: ScannedMask, unit: MaskWorkUnit) -> GeneratedMask:
        if scanned.reason is not None:
            return GeneratedMask(scanned, scanned.reason)
        mask = self._read_mask(scanned)
        if mask.size > _MAX_PIXELS:
            height, width = mask.shape
            return GeneratedMask(
                scanned,
                f"{height}x{width} pixels, expected at most {_MAX_PIXELS} in all; sampling.size "
                "makes images of another size",
            )
        try:
            # A mask at a time: its images are one batch, whatever else the part holds.
            made = list(
                self._generator.generate([(scanned.ref.name, mask)], first=unit.first_image)
            )
        except DatasetError as error:
            return GeneratedMask(scanned, str(error))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise StageError(
                f"mask {scanned.ref.name!r}: not enough memory for images of {mask.shape[0]}x"
                f"{mask.shape[1]}; set a smaller sampling.batch or sampling.size: {error}"
            ) from error
        images = np.stack([one.image for one in made])
        lineages = tuple(_lineage(one, unit) for one in made)
        return GeneratedMask(scanned, GeneratedImages(mask, made[0].label, images, lineages))

    def _read_mask(self, scanned: ScannedMask) -> UInt8[ndarray, "h w"]:
        """Return a mask at the size of its images.

        It could be read at the survey. If it cannot now, that is no property of the mask, so no
        row may tell it for ever: the next run surveys anew.
        """
        size = self._state.config.sampling.size
        try:
            mask = self._source.read(scanned.ref, classes=len(self._state.classes))
        except DatasetError as error:
            raise StageError(f"{error}; it changed while images were made, run again") from error
        mask = mask if size is None else resize_mask(mask, size)
        if mask_digest(mask) != scanned.mask_id:
            raise StageError(f"mask {scanned.ref.name!r} changed while images were made; run again")
        return mask


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Say whether it is a lack of memory; torch has no class of its own for it on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
        error
    )


def _lineage(generated: GeneratedImage, unit: MaskWorkUnit) -> dict[str, Any]:
    return {**generated.lineage.to_json(), "batch": [unit.first_image, unit.last_image]}
