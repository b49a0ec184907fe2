"""Batches and loss for training a CAT-Seg on labelled images."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from loraseg.data import IGNORE, DatasetFolder, Sample
from loraseg.data.transforms import AugmentConfig, augment, resize, resize_shortest_edge
from loraseg.errors import DatasetError
from loraseg.seeding import numpy_generator
from loraseg.segment.base import SegmentationBase
from loraseg.segment.losses import catseg_bce
from loraseg.tensor_types import Float, Int, Tensor, UInt8, ndarray

__all__ = [
    "TrainingImages",
    "attention_lora",
    "class_tokens",
    "fixed_threads",
    "normalized",
    "segmentation_loss",
]

_CACHE_BYTES = 2 * 2**30


class TrainingImages:
    """Augmented batches, each a pure function of (seed, keys, step).

    Images pass in rounds, every image once a round in an order drawn for that round, so that no
    state has to be kept between steps. Decoded images stay in memory up to 2 GiB.
    """

    def __init__(
        self,
        dataset: DatasetFolder,
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
            first_resize: (height, width) that every image is resized to before that.
            seed: The user's seed.
            keys: What the batches are for, such as the adapter's name.

        Raises:
            DatasetError: There is no sample, or one has no mask.
        """
        unlabelled = [sample.id for sample in samples if sample.mask is None]
        if not samples or unlabelled:
            raise DatasetError(
                f"{dataset.path}: expected labelled training images, got {len(samples)} images, "
                f"{len(unlabelled)} without a mask"
            )
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
            image, mask = self._load(self._index_at(position))
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
                f"{self._dataset.path}: no labelled pixel in any of {len(self)} masks (all "
                f"{IGNORE}); nothing to learn from"
            )

    def _index_at(self, position: int) -> int:
        round_, place = divmod(position, len(self))
        generator = numpy_generator(self.seed, *self._keys, "order", round_)
        return int(generator.permutation(len(self))[place])

    def _load(self, index: int) -> tuple[ndarray, ndarray]:
        if index in self._decoded:
            return self._decoded[index]
        image, mask = self._dataset.load(self._samples[index])
        if mask is None:
            raise DatasetError(f"{self._samples[index].image}: has no mask")
        if self._resize is not None:
            image, mask = resize(image, mask, self._resize)
        if len(self._augment.shortest_edge) == 1:
            # What augmentation would do first, and the same each time.
            image, mask = resize_shortest_edge(image, mask, self._augment.shortest_edge[0])
        if self._decoded_bytes + image.nbytes + mask.nbytes <= _CACHE_BYTES:
            self._decoded[index] = image, mask
            self._decoded_bytes += image.nbytes + mask.nbytes
        return image, mask


def class_tokens(base: SegmentationBase, classes: Sequence[str]) -> Int[Tensor, "t l"]:
    """Return the token ids of each class name in the base's prompt.

    Of a name that lists synonyms with ", " the first counts (methods A.2).
    """
    return base.tokenizer([base.prompt.format(name.split(", ")[0]) for name in classes])


def segmentation_loss(
    base: SegmentationBase,
    tokens: Tensor,
    batch: tuple[UInt8[ndarray, "b s s 3"], UInt8[ndarray, "b s s"]],
    *,
    mask_ignored: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Float[Tensor, ""] | None:
    """Return CAT-Seg's loss on a batch (methods A.6), None if no pixel of it is labelled.

    Args:
        base: Its model is run as it is, with whatever has been put into it.
        tokens: Class prompts as token ids (t, l); encoded anew, since the text encoder trains.
        batch: Images in RGB and class ids.
        mask_ignored: Leave ignored pixels out of the mean.
        precision: "bf16" runs the forward pass under autocast.
    """
    images, labels = batch
    if not (labels != IGNORE).any():
        return None
    device = next(base.model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        text = base.model.encode_text(tokens.to(device))
        logits = base.model(normalized(base, images).to(device), text[:, None])
    return catseg_bce(
        logits.float(), torch.from_numpy(labels).to(device), IGNORE, mask_ignored=mask_ignored
    )


def normalized(
    base: SegmentationBase, images: UInt8[ndarray, "b s s 3"]
) -> Float[Tensor, "b 3 n n"]:
    """Normalise by the base's mean and std, then resize to CLIP's input (methods A.3, A.7)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (base.mean, base.std))
    side = base.model.config.image_size
    scaled = (pixels - mean) / std
    if scaled.shape[-1] == side:
        return scaled
    return nn.functional.interpolate(scaled, (side, side), mode="bilinear", align_corners=False)


@contextmanager
def attention_lora(
    model: nn.Module, mode: Literal["active", "inert"]
) -> Generator[None, None, None]:
    """Let CLIP's attention call its q, k and v modules ("active") or only read their weights."""
    switches: list[Any] = [module for module in model.modules() if hasattr(module, "call_modules")]
    before = [module.call_modules for module in switches]
    for module in switches:
        module.call_modules = mode == "active"
    try:
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.call_modules = value


@contextmanager
def fixed_threads(count: int) -> Generator[None, None, None]:
    """Compute with ``count`` CPU threads; sums over another count differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
