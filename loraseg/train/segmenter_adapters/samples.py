"""Batches and loss for training a CAT-Seg on labelled images."""

import dataclasses
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import nn

from loraseg.data import IGNORE, Dataset, Sample, load_pair
from loraseg.data.transforms import AugmentConfig, augment, resize_shortest_edge
from loraseg.errors import DatasetError
from loraseg.seeding import numpy_generator
from loraseg.segment.open_vocabulary.base import SegmentationBase
from loraseg.segment.open_vocabulary.losses import catseg_bce
from loraseg.tensor_types import Float, Int, Tensor, UInt8, ndarray
from loraseg.train.core.shuffling import require_labels, shuffled_index

__all__ = [
    "ImageFeatures",
    "Precision",
    "TrainingImages",
    "clip_input",
    "encode_image_features",
    "encode_text",
    "fixed_threads",
    "has_labels",
    "segmentation_loss",
]

Precision = Literal["fp32", "bf16"]

_CACHE_BYTES = 2 * 2**30


class TrainingImages:
    """Augmented batches, each a pure function of (seed, keys, step).

    Images pass in rounds, every image once a round in an order drawn for that round, so that no
    state has to be kept between steps. Decoded images stay in memory up to 2 GiB.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: Sequence[Sample],
        augmentation: AugmentConfig,
        *,
        first_resize: tuple[int, int] | None = None,
        seed: int = 0,
        keys: tuple[str | int, ...] = (),
    ) -> None:
        """Prepare to load ``samples``; nothing is read yet.

        Args:
            dataset: Where the samples are from.
            samples: All with masks.
            augmentation: What happens to each image each time.
            first_resize: (height, width) that image and mask are resized to before that, both by
                the nearest pixel as SemLA does for Cityscapes (methods B.2).
            seed: The user's seed.
            keys: What the batches are for, such as the adapter's name.

        Raises:
            DatasetError: There is no sample, or one has no mask.
        """
        require_labels(dataset, samples)
        self._dataset, self._samples = dataset, tuple(samples)
        self._augment, self._resize = augmentation, first_resize
        self.seed, self._keys = seed, keys
        self._decoded: dict[int, tuple[ndarray, ndarray]] = {}
        self._decoded_bytes = 0

    def __len__(self) -> int:
        return len(self._samples)

    def batch(
        self, step: int, size: int
    ) -> tuple[UInt8[ndarray, "b s s 3"], UInt8[ndarray, "b s s"]]:
        """Return images in RGB and class ids (255 = ignore) of one step.

        Raises:
            DatasetError: An image or mask is broken.
        """
        pairs: list[tuple[ndarray, ndarray]] = []
        for position in range(step * size, (step + 1) * size):
            image, mask = self._load(shuffled_index(position, len(self), self.seed, *self._keys))
            generator = numpy_generator(self.seed, *self._keys, "augment", position)
            pairs.append(augment(image, mask, self._augment, generator))
        return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs])

    def require_labels(self) -> None:
        """Make sure that some pixel is labelled; reads masks only until one is found.

        Raises:
            DatasetError: All pixels of all masks are ignored.
        """
        if not any((self._load(i)[1] != IGNORE).any() for i in range(len(self))):
            raise DatasetError(
                f"{self._dataset.location}: no labelled pixel in any of {len(self)} masks (all "
                f"{IGNORE}); nothing to learn from"
            )

    def _load(self, index: int) -> tuple[ndarray, ndarray]:
        if index in self._decoded:
            return self._decoded[index]
        image, mask = load_pair(self._dataset, self._samples[index])
        if self._resize is not None:
            image, mask = (_resize_nearest(pixels, self._resize) for pixels in (image, mask))
        if len(self._augment.shortest_edge) == 1:
            # What augmentation would do first, and the same each time.
            image, mask = resize_shortest_edge(image, mask, self._augment.shortest_edge[0])
        if self._decoded_bytes + image.nbytes + mask.nbytes <= _CACHE_BYTES:
            self._decoded[index] = image, mask
            self._decoded_bytes += image.nbytes + mask.nbytes
        return image, mask


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the aggregator sees of a batch of images: CLIP's dense features, upsampled guidance."""

    features: Float[Tensor, "b d g g"]
    guidance: tuple[Float[Tensor, "b _ g2 g2"], Float[Tensor, "b _ g4 g4"]]


def encode_image_features(
    base: SegmentationBase, images: UInt8[ndarray, "b s s 3"], precision: Precision = "fp32"
) -> ImageFeatures:
    """Run everything before the aggregator on images in RGB; gradients flow as the model says."""
    with _autocast(base, precision):
        return ImageFeatures(*base.model.encode_images(clip_input(base, images)))


def encode_text(
    base: SegmentationBase, tokens: Int[Tensor, "t p l"], precision: Precision = "fp32"
) -> Float[Tensor, "t p d"]:
    """Encode class prompts given as token ids; gradients flow as the model says."""
    with _autocast(base, precision):
        return base.encode_tokens(tokens)


def segmentation_loss(
    base: SegmentationBase,
    text: Float[Tensor, "t p d"],
    images: ImageFeatures,
    labels: UInt8[ndarray, "b s s"],
    *,
    mask_ignored: bool = False,
    precision: Precision = "fp32",
) -> Float[Tensor, ""]:
    """Return CAT-Seg's loss on a batch (methods A.6).

    Args:
        base: Its aggregator is run as it is, with whatever has been put into it.
        text: From :func:`encode_text`.
        images: From :func:`encode_side`.
        labels: Class ids, 255 = ignore.
        mask_ignored: Leave ignored pixels out of the mean; then some pixel must be labelled.
        precision: "bf16" runs the forward pass under autocast.
    """
    bank = text[None].expand(len(labels), -1, -1, -1)
    with _autocast(base, precision):
        logits = base.model.aggregator(images.features, bank, images.guidance)
    target = torch.from_numpy(labels).to(base.device)
    return catseg_bce(logits.float(), target, IGNORE, mask_ignored=mask_ignored)


def has_labels(labels: UInt8[ndarray, "b s s"]) -> bool:
    """Return whether there is anything to learn from."""
    return bool((labels != IGNORE).any())


def _autocast(base: SegmentationBase, precision: Precision) -> torch.autocast:
    return torch.autocast(base.device.type, torch.bfloat16, enabled=precision == "bf16")


def clip_input(
    base: SegmentationBase, images: UInt8[ndarray, "b s s 3"]
) -> Float[Tensor, "b 3 n n"]:
    """Normalise by the base's mean and std, then resize to CLIP's input (methods A.3, A.7)."""
    scaled = base.normalise(torch.from_numpy(images).to(base.device).permute(0, 3, 1, 2))
    side = base.model.config.image_size
    if scaled.shape[-1] == side:
        return scaled
    return nn.functional.interpolate(scaled, (side, side), mode="bilinear", align_corners=False)


def _resize_nearest(pixels: ndarray, size: tuple[int, int]) -> ndarray:
    """Resize (h, w, ...) by the pixel nearest to each new pixel's centre ("nearest-exact")."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp)
        for new, old in zip(size, pixels.shape[:2], strict=True)
    )
    return pixels[rows][:, columns]


@contextmanager
def fixed_threads(count: int) -> Generator[None, None, None]:
    """Compute with ``count`` CPU threads; sums over another count differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
