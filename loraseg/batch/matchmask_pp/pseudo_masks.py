"""Pseudo-masks: confident predictions of a segmenter on unlabelled images (MatchMask++).

Pixels whose largest class probability is below a threshold are 255; the generator's conditioning
fills them with the nearest class. Without a published value the threshold is 0.9, UniMatch uses
0.95.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from loraseg.backbones.device import best_device
from loraseg.batch.core.content_digest import content_digest
from loraseg.batch.core.executor import Executor, Stage
from loraseg.batch.core.run import run_units
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
    "PseudoMaskUnit",
    "PseudoMaskWriter",
    "list_images",
    "plan_units",
    "write_pseudo_masks",
    "write_summary",
]

SUMMARY_KEY = "pseudo.json"
_IMAGES_PER_UNIT = 64
_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True, slots=True)
class PseudoMaskConfig:
    """Unlabelled images, segmenter and output.

    Attributes:
        images: Store URI of a dataset folder (``images/<split>/``, folders in it included) or of
            a folder of images.
        output: Store URI of a dataset folder of masks; it belongs to one segmenter.
        segmenter: File of the segmenter.
        split: Split of a dataset folder.
        threshold: Smallest class probability of a labelled pixel; the others are 255.
    """

    images: str
    output: str
    segmenter: str
    split: str = "train"
    threshold: float = 0.9

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ConfigError: The threshold is out of range.
        """
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold: got {self.threshold}, expected 0 to 1")


@dataclass(frozen=True, slots=True)
class PseudoMaskUnit:
    """The keys of images that one worker segments at once."""

    keys: tuple[str, ...]

    @property
    def id(self) -> str:
        """The first 32 hex digits of a sha256 over the keys."""
        text = "\n".join(self.keys)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def __str__(self) -> str:
        """Return the first and the last key."""
        return f"images {self.keys[0]!r} to {self.keys[-1]!r}"


def list_images(images: str, split: str = "train") -> list[str]:
    """Return the keys of the images, in code point order.

    Args:
        images: As in :class:`PseudoMaskConfig`.
        split: As in :class:`PseudoMaskConfig`.

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


def plan_units(keys: Sequence[str]) -> list[PseudoMaskUnit]:
    """Cut the images into work units."""
    return [
        PseudoMaskUnit(tuple(keys[start : start + _IMAGES_PER_UNIT]))
        for start in range(0, len(keys), _IMAGES_PER_UNIT)
    ]


def write_pseudo_masks(config: PseudoMaskConfig, executor: Executor) -> dict[str, Any]:
    """Write the masks of all images; return the summary, as in ``pseudo.json``.

    Safe to kill at any point and to run again; all images are segmented again.

    Args:
        config: Images, segmenter and output.
        executor: Runs the work units.

    Raises:
        DatasetError: There are no images.
        LorasegError: As raised by stores and the segmenter.
    """
    rejected: dict[str, str] = {}
    units = plan_units(list_images(config.images, config.split))
    with closing(run_units(executor, _STAGES, config, units)) as results:
        for _, rejected_in_unit in results:
            rejected |= rejected_in_unit
    return write_summary(config, rejected)


class PseudoMaskWriter:
    """Writes masks. Loads the segmenter for the first image; one thread at a time."""

    def __init__(self, config: PseudoMaskConfig) -> None:
        """Open the stores; the segmenter is loaded with the first image."""
        self._config = config
        self._images, self._output = open_store(config.images), open_store(config.output)

    def __call__(self, unit: PseudoMaskUnit) -> dict[str, str]:
        """Write the masks of a unit.

        Returns:
            Why an image has no mask, by key.

        Raises:
            LorasegError: As raised by stores and the segmenter.
        """
        rejected: dict[str, str] = {}
        for key in unit.keys:
            try:
                mask_key = self._mask_key(key)
                mask = self._mask(decode_image(self._images.get(key)))
            except (DatasetError, ObjectNotFoundError) as error:
                rejected[key] = str(error)
                continue
            if (mask == IGNORE).all():
                rejected[key] = f"no pixel with a probability of {self._config.threshold}"
            else:
                self._output.put(mask_key, encode_mask(mask, self._segmenter.label_space))
        return rejected

    @cached_property
    def _segmenter(self) -> ClosedSetSegmenter:
        return load_closed_set_segmenter(self._config.segmenter, device=str(best_device()))

    def _mask(self, image: UInt8[ndarray, "h w 3"]) -> UInt8[ndarray, "h w"]:
        best = self._segmenter.log_probabilities(image[None])[0].max(0)
        confident = best.values >= torch.tensor(self._config.threshold).log()
        ignore = torch.tensor(IGNORE, dtype=torch.uint8, device=confident.device)
        return torch.where(confident, best.indices.byte(), ignore).cpu().numpy()

    def _mask_key(self, key: str) -> str:
        """Return the key of the mask, which no other image's mask has.

        Raises:
            DatasetError: Not every store can hold image and mask under these keys.
        """
        path = key.removeprefix(f"images/{self._config.split}/")
        # The suffix stays: "a.png" and "a.jpg" have two masks.
        mask_key = f"masks/{self._config.split}/{path}.png"
        if reason := key_error(key) or key_error(mask_key):
            raise DatasetError(reason)
        if ".png/" in path:
            # A folder cannot hold both masks "a.jpg.png" and "a.jpg.png/b.jpg.png".
            raise DatasetError(f"{key!r}: lies in a folder whose name ends in .png, as masks do")
        return mask_key


_STAGES = (Stage("pseudo-masks", PseudoMaskWriter),)


def write_summary(config: PseudoMaskConfig, rejected: dict[str, str]) -> dict[str, Any]:
    """Write the class list and ``pseudo.json``, which says that all masks are written.

    Args:
        config: Names segmenter and output.
        rejected: Why an image has no mask, by key.

    Returns:
        The content of ``pseudo.json``.

    Raises:
        LorasegError: As raised by store and segmenter.
    """
    output = open_store(config.output)
    segmenter = load_closed_set_segmenter(config.segmenter)
    masks = list(output.list(f"masks/{config.split}/"))
    classes = [{"id": i, "name": name} for i, name in enumerate(segmenter.label_space.names)]
    output.put("classes.json", (json.dumps({"classes": classes}, indent=1) + "\n").encode())
    summary = {
        "segmenter": segmenter.digest,
        "threshold": config.threshold,
        "masks": len(masks),
        "digest": content_digest(output, masks),
        "refused": dict(sorted(rejected.items())),
    }
    # ASCII, since keys of rejected images may have lone surrogates.
    output.put(SUMMARY_KEY, (json.dumps(summary, indent=1, sort_keys=True) + "\n").encode())
    return summary
