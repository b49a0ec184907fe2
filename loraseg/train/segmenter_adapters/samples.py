"""Batches of labelled images for training a segmenter, and its loss on them."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from loraseg.data import IGNORE, Dataset, Sample, load_pair
from loraseg.data.transforms import AugmentConfig, augment, resize_shortest_edge
from loraseg.errors import DatasetError
from loraseg.seeding import numpy_generator
from loraseg.segment.open_vocabulary.protocol import OpenVocabularyBase
from loraseg.tensor_types import Float, Int, Tensor, UInt8, ndarray
from loraseg.train.core.shuffling import require_labels, shuffled_index

__all__ = [
    "Precision",
    "TrainingImages",
    "encode_image_features",
    "encode_text",
    "has_labels",
    "network_input",
    "segmentation_loss",
]

Precision = Literal["fp32", "bf16"]

_CACHE_BYTES = 2 * 2**30


class TrainingImages:
    """Augmented batches, each a pure function of (seed, keys, step).

    Every image occurs once per epoch, in an order drawn for that epoch, so no state is kept between
    steps. Decoded images are cached in memory up to 2 GiB.
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
        """Prepare to load ``samples``; reads nothing yet.

        Args:
            dataset: The dataset of the samples.
            samples: Samples with masks.
            augmentation: Random augmentation of each image.
            first_resize: (height, width) that image and mask are resized to before augmentation,
                both by nearest pixel, as SemLA does for Cityscapes.
            seed: Seed of order and augmentation.
            keys: Keys of the random streams beside the seed, such as the adapter's name.

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
        """Return RGB images and class ids (255 = ignore) of one step.

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
        """Check that some pixel is labelled; stops reading at the first one.

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
            # The first, deterministic part of the augmentation.
            image, mask = resize_shortest_edge(image, mask, self._augment.shortest_edge[0])
        if self._decoded_bytes + image.nbytes + mask.nbytes <= _CACHE_BYTES:
            self._decoded[index] = image, mask
            self._decoded_bytes += image.nbytes + mask.nbytes
        return image, mask


def encode_image_features(
    base: OpenVocabularyBase, images: UInt8[ndarray, "b s s 3"], precision: Precision = "fp32"
) -> Any:
    """Return the base's features of RGB images, with gradients if the model requires them."""
    with _autocast(base, precision):
        return base.encode_images(network_input(base, images))


def encode_text(
    base: OpenVocabularyBase, tokens: Int[Tensor, "t p l"], precision: Precision = "fp32"
) -> Float[Tensor, "t p d"]:
    """Return text features of token ids, with gradients if the model requires them."""
    with _autocast(base, precision):
        return base.encode_tokens(tokens)


def segmentation_loss(
    base: OpenVocabularyBase,
    text: Float[Tensor, "t p d"],
    images: Any,
    labels: UInt8[ndarray, "b s s"],
    *,
    mask_ignored: bool = False,
    precision: Precision = "fp32",
) -> Float[Tensor, ""]:
    """Return the base's loss on a batch.

    Args:
        base: The base, with the adapters that are applied to it.
        text: Text features of :func:`encode_text`.
        images: Image features of :func:`encode_image_features`.
        labels: Class ids, 255 = ignore.
        mask_ignored: Leave ignored pixels out of the mean; then some pixel must be labelled.
        precision: "bf16" runs the forward pass under autocast.

    Raises:
        DatasetError: A label is neither a class nor 255.
        StageError: ``mask_ignored`` is set and every pixel is ignored.
    """
    bank = text[None].expand(len(labels), -1, -1, -1)
    with _autocast(base, precision):
        logits = base.decode(images, bank)
    target = torch.from_numpy(labels).to(base.device)
    return base.loss(logits.float(), target, mask_ignored=mask_ignored)


def has_labels(labels: UInt8[ndarray, "b s s"]) -> bool:
    """Return whether some pixel of a batch is labelled."""
    return bool((labels != IGNORE).any())


def _autocast(base: OpenVocabularyBase, precision: Precision) -> torch.autocast:
    return torch.autocast(base.device.type, torch.bfloat16, enabled=precision == "bf16")


def network_input(
    base: OpenVocabularyBase, images: UInt8[ndarray, "b s s 3"]
) -> Float[Tensor, "b 3 n n"]:
    """Normalise RGB images and resize them to the network's input, in the order of CAT-Seg."""
    scaled = base.normalise(torch.from_numpy(images).to(base.device).permute(0, 3, 1, 2))
    side = base.input_size
    if scaled.shape[-1] == side:
        return scaled
    return nn.functional.interpolate(scaled, (side, side), mode="bilinear", align_corners=False)


def _resize_nearest(pixels: ndarray, size: tuple[int, int]) -> ndarray:
    """Resize (h, w, ...) by nearest pixel centre, as torch's mode "nearest-exact"."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp)
        for new, old in zip(size, pixels.shape[:2], strict=True)
    )
    return pixels[rows][:, columns]
