"""The first stage of a part of the work: draw the images of its masks."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from loraseg.errors import DatasetError, LorasegError, StageError
from loraseg.factory.equipment import load_generator
from loraseg.factory.pinned import Pinned
from loraseg.factory.plan import Entry, Part
from loraseg.factory.sources import MaskSource
from loraseg.synth.generator import Generated, Generator
from loraseg.synth.lineage import mask_digest
from loraseg.synth.sizes import mask_at_size
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["Draft", "Draw", "Drawn", "Made"]

# Attention in full needs gigabytes for an image of this size, whatever the machine.
_MOST_PIXELS = 4 * 1024**2


@dataclass(frozen=True, slots=True, eq=False)
class Made:
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
class Drawn:
    """A mask as planned, with its images or the reason why it has none."""

    entry: Entry
    result: Made | str


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A part with the images of its masks, or what ended it."""

    part: Part
    drawn: tuple[Drawn, ...] = ()
    error: LorasegError | None = None


class Draw:
    """The first stage. Loads the generator for the first part; one thread at a time."""

    def __init__(self, pinned: Pinned) -> None:
        """Take the job; nothing is loaded yet, so that a failure to is an outcome."""
        self._pinned = pinned
        config = pinned.config
        self._source = MaskSource(config.masks, config.classes, config.split)

    def __call__(self, part: Part) -> Draft:
        """Draw the images of each mask that can be drawn."""
        try:
            return Draft(part, tuple(self._drawn(entry, part) for entry in part.entries))
        except LorasegError as error:
            return Draft(part, error=error)

    @cached_property
    def _generator(self) -> Generator:
        return load_generator(self._pinned)

    def _drawn(self, entry: Entry, part: Part) -> Drawn:
        if entry.reason is not None:
            return Drawn(entry, entry.reason)
        mask = self._read(entry)
        if mask.size > _MOST_PIXELS:
            height, width = mask.shape
            return Drawn(
                entry,
                f"{height}x{width} pixels, expected at most {_MOST_PIXELS} in all; sampling.size "
                "makes images of another size",
            )
        try:
            # A mask at a time: its images are one batch, whatever else the part holds.
            made = list(self._generator.generate([(entry.mask.name, mask)], first=part.first))
        except DatasetError as error:
            return Drawn(entry, str(error))
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            raise StageError(
                f"mask {entry.mask.name!r}: not enough memory for images of {mask.shape[0]}x"
                f"{mask.shape[1]}; set a smaller sampling.batch or sampling.size: {error}"
            ) from error
        images = np.stack([one.image for one in made])
        lineages = tuple(_lineage(one, part) for one in made)
        return Drawn(entry, Made(mask, made[0].label, images, lineages))

    def _read(self, entry: Entry) -> UInt8[ndarray, "h w"]:
        """Return a mask at the size of its images.

        It could be read at the survey. If it cannot now, that is no property of the mask, so no
        row may tell it for ever: the next run surveys anew.
        """
        size = self._pinned.config.sampling.size
        try:
            mask = self._source.read(entry.mask, classes=len(self._pinned.classes))
        except DatasetError as error:
            raise StageError(f"{error}; it changed while images were made, run again") from error
        mask = mask if size is None else mask_at_size(mask, size)
        if mask_digest(mask) != entry.mask_id:
            raise StageError(f"mask {entry.mask.name!r} changed while images were made; run again")
        return mask


def _lacks_memory(error: MemoryError | RuntimeError) -> bool:
    """Say whether it is a lack of memory; torch has no class of its own for it on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
        error
    )


def _lineage(made: Generated, part: Part) -> dict[str, Any]:
    return {**made.lineage.to_json(), "batch": [part.first, part.last]}
