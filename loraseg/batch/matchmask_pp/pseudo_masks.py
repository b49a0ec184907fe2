"""Pseudo-masks: what a segmenter is sure of in unlabelled images, for a generator (b.6)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from loraseg.backbones.device import best_device
from loraseg.batch.core.content_digest import content_digest
from loraseg.data.labels import IGNORE
from loraseg.data.masks import encode_mask
from loraseg.data.untrusted_images import decode_image
from loraseg.errors import ConfigError, DatasetError
from loraseg.segment.closed_set.checkpoint import ClosedSetSegmenter, load_closed_set_segmenter
from loraseg.storage import ObjectNotFoundError, open_store
from loraseg.storage.store import key_error
from loraseg.tensor_types import UInt8, ndarray

__all__ = [
    "SUMMARY_KEY",
    "PseudoMaskConfig",
    "PseudoMaskWriter",
    "list_images",
    "work_units",
    "write_summary",
]

SUMMARY_KEY = "pseudo.json"
_IMAGES_PER_UNIT = 64
_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True, slots=True)
class PseudoMaskConfig:
    """Where unlabelled images are, and what becomes of them.

    Attributes:
        images: Store URI of a dataset folder (``images/<split>/``, folders in it included) or of
            a folder of images.
        output: Store URI of a dataset folder of masks; it belongs to one segmenter.
        segmenter: File of the segmenter.
        split: Of a dataset folder.
        threshold: Pixels whose largest probability is lower say nothing (255).
    """

    images: str
    output: str
    segmenter: str
    split: str = "train"
    threshold: float = 0.9

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold: got {self.threshold}, expected 0 to 1")


def list_images(images: str, split: str = "train") -> list[str]:
    """Return the keys of the images, in code point order.

    Args:
        images: As in :class:`PseudoMaskConfig`.
        split: The same.

    Raises:
        DatasetError: There is none.
        StoreError: The store cannot be read.
    """
    store = open_store(images)
    folder = f"images/{split}/"
    keys = [key for key in store.list(folder) if key.lower().endswith(_SUFFIXES)]
    if not keys:
        keys = [k for k in store.list() if "/" not in k and k.lower().endswith(_SUFFIXES)]
    if not keys:
        raise DatasetError(f"{images}: no images; expected {folder}*.png or *.jpg")
    return sorted(keys)


def work_units(keys: Sequence[str]) -> list[list[str]]:
    """Cut the images into units of work."""
    return [
        list(keys[start : start + _IMAGES_PER_UNIT])
        for start in range(0, len(keys), _IMAGES_PER_UNIT)
    ]


class PseudoMaskWriter:
    """Writes the masks of some images. Loads the segmenter for the first; one thread at a time."""

    def __init__(self, config: PseudoMaskConfig) -> None:
        """Take the job; nothing is loaded yet."""
        self._config = config
        self._images, self._output = open_store(config.images), open_store(config.output)

    def __call__(self, keys: Sequence[str]) -> dict[str, str]:
        """Write the masks of images.

        Returns:
            Why an image has no mask, by key.

        Raises:
            LorasegError: As raised by stores and the segmenter.
        """
        refused: dict[str, str] = {}
        for key in keys:
            try:
                mask_key = self._mask_key(key)
                mask = self._mask(decode_image(self._images.get(key)))
            except (DatasetError, ObjectNotFoundError) as error:
                refused[key] = str(error)
                continue
            if (mask == IGNORE).all():
                refused[key] = f"no pixel with a probability of {self._config.threshold}"
            else:
                self._output.put(mask_key, encode_mask(mask, self._segmenter.label_space))
        return refused

    @cached_property
    def _segmenter(self) -> ClosedSetSegmenter:
        return load_closed_set_segmenter(self._config.segmenter, device=str(best_device()))

    def _mask(self, image: UInt8[ndarray, "h w 3"]) -> UInt8[ndarray, "h w"]:
        best = self._segmenter.log_probabilities(image[None])[0].max(0)
        sure = best.values >= torch.tensor(self._config.threshold).log()
        unsure = torch.tensor(IGNORE, dtype=torch.uint8, device=sure.device)
        return torch.where(sure, best.indices.byte(), unsure).cpu().numpy()

    def _mask_key(self, key: str) -> str:
        """Return where the mask goes, which no other image's does.

        Raises:
            DatasetError: Not every store can hold image and mask under such a name.
        """
        path = key.removeprefix(f"images/{self._config.split}/")
        # Two images that differ in their suffix alone keep two masks.
        mask_key = f"masks/{self._config.split}/{path}.png"
        if fault := key_error(key) or key_error(mask_key):
            raise DatasetError(fault)
        if ".png/" in path:
            # No folder can hold the masks "a.jpg.png" and "a.jpg.png/b.jpg.png" at once.
            raise DatasetError(f"{key!r}: lies in a folder whose name ends in .png, as masks do")
        return mask_key


def write_summary(config: PseudoMaskConfig, rejected: dict[str, str]) -> dict[str, Any]:
    """Write the class list and the note that all masks are there; return the note.

    Raises:
        LorasegError: As raised by stores and the segmenter.
    """
    output = open_store(config.output)
    segmenter = load_closed_set_segmenter(config.segmenter)
    masks = list(output.list(f"masks/{config.split}/"))
    names = [{"id": i, "name": name} for i, name in enumerate(segmenter.label_space.names)]
    output.put("classes.json", (json.dumps({"classes": names}, indent=1) + "\n").encode())
    note = {
        "segmenter": segmenter.digest,
        "threshold": config.threshold,
        "masks": len(masks),
        "digest": content_digest(output, masks),
        "refused": dict(sorted(rejected.items())),
    }
    output.put(SUMMARY_KEY, (json.dumps(note, indent=1, sort_keys=True) + "\n").encode())
    return note
