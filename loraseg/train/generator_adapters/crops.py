"""Training images of a generator: whole images resized, or a few crops of each."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from loraseg.data import IGNORE, Dataset, Sample, load_pair
from loraseg.errors import ConfigError
from loraseg.seeding import numpy_generator
from loraseg.tensor_types import UInt8, ndarray
from loraseg.train.core.shuffling import require_labels

__all__ = ["Crop", "CroppedImages", "ViewConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Size of the training images.

    Attributes:
        size: (height, width) in pixels.
        fit: "resize" resizes the whole image without keeping its aspect ratio, as FreestyleNet.
            "crop" takes crops of the size; a smaller image is enlarged first.
        crops: Number of crops of each image, drawn once by seed so that their latents can be
            cached; "resize" takes one.
    """

    size: tuple[int, int] = (512, 512)
    fit: Literal["resize", "crop"] = "resize"
    crops: int = 8

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if min(self.size) < 1 or self.crops < 1:
            raise ConfigError(
                f"size {self.size}, crops {self.crops}: expected (height, width) and a number of "
                "at least 1"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Crop:
    """One crop of a sample; ``index`` counts the crops of the sample."""

    sample: Sample
    index: int = 0


class CroppedImages:
    """Loads crops of samples; equal arguments always give equal pixels."""

    def __init__(
        self,
        dataset: Dataset,
        samples: Sequence[Sample],
        config: ViewConfig,
        *,
        seed: int = 0,
        keys: tuple[str | int, ...] = (),
    ) -> None:
        """Prepare to load; reads nothing yet.

        Args:
            dataset: The dataset of the samples.
            samples: Samples with masks.
            config: Size and fit.
            seed: Seed of the crops and, with the keys, of the batches.
            keys: Keys of the batches' random streams. Crops do not depend on them, so that all
                adapters of a seed share their latents.

        Raises:
            DatasetError: There is no sample, or one has no mask.
        """
        require_labels(dataset, samples)
        self._dataset, self.config = dataset, config
        self.seed, self.keys = seed, keys
        crops = config.crops if config.fit == "crop" else 1
        self.crops = tuple(Crop(sample, crop) for sample in samples for crop in range(crops))

    def load(self, crop: Crop) -> tuple[UInt8[ndarray, "h w 3"], UInt8[ndarray, "h w"]]:
        """Return image and mask of a crop.

        Raises:
            DatasetError: A file is broken.
        """
        image, mask = load_pair(self._dataset, crop.sample)
        height, width = self.config.size
        if self.config.fit == "resize":
            return _resize_pair(image, mask, (height, width))
        grow = max(height / mask.shape[0], width / mask.shape[1], 1.0)
        if grow > 1:
            rows, columns = (round(length * grow) for length in mask.shape)
            image, mask = _resize_pair(image, mask, (max(rows, height), max(columns, width)))
        top, left = self._corner(crop, mask)
        part = slice(top, top + height), slice(left, left + width)
        return np.ascontiguousarray(image[part]), np.ascontiguousarray(mask[part])

    def fingerprint(self, crop: Crop) -> dict[str, Any]:
        """Return JSON values that decide the pixels of a crop's image.

        Raises:
            DatasetError: The image cannot be read.
        """
        image_digest, mask_digest = self._dataset.digest(crop.sample)
        values: dict[str, Any] = {
            "image": image_digest,
            "size": list(self.config.size),
            "fit": self.config.fit,
        }
        if self.config.fit == "crop":
            # The position of the crop may depend on the mask, see _corner.
            values |= {"mask": mask_digest, "draw": [self.seed, crop.sample.id, crop.index]}
        return values

    def _corner(self, view: Crop, mask: ndarray) -> tuple[int, int]:
        """Draw the top left corner of a crop; move a crop without labelled pixels to one."""
        generator = numpy_generator(self.seed, "crop", view.sample.id, view.index)
        ranges = [have - want for have, want in zip(mask.shape, self.config.size, strict=True)]
        corner = [int(generator.integers(0, room + 1)) for room in ranges]
        ends = [start + want for start, want in zip(corner, self.config.size, strict=True)]
        if (mask[corner[0] : ends[0], corner[1] : ends[1]] == IGNORE).all():
            labelled = np.argwhere(mask != IGNORE)
            if len(labelled):
                place = labelled[int(generator.integers(len(labelled)))]
                middle = [
                    int(at) - want // 2 for at, want in zip(place, self.config.size, strict=True)
                ]
                corner = [min(max(at, 0), room) for at, room in zip(middle, ranges, strict=True)]
        return corner[0], corner[1]


def _resize_pair(image: ndarray, mask: ndarray, size: tuple[int, int]) -> tuple[ndarray, ndarray]:
    """Resize the image bicubically, smoothed when it shrinks, and the mask by nearest pixels."""
    if mask.shape == size:
        return image, mask
    to = (size[1], size[0])
    return (
        np.array(Image.fromarray(image).resize(to, Image.Resampling.BICUBIC)),
        np.array(Image.fromarray(mask).resize(to, Image.Resampling.NEAREST)),
    )
