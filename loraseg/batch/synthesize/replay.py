"""Regenerate the image of a pair from its lineage."""

import json
from dataclasses import dataclass, replace

import numpy as np

from loraseg.batch.synthesize.models import load_generator
from loraseg.batch.synthesize.state import read_run_state
from loraseg.data.masks import decode_mask
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import PairRow
from loraseg.data.untrusted_images import decode_image
from loraseg.errors import MALFORMED_INPUT_ERRORS, DatasetError, IntegrityError
from loraseg.synth.generator import Generator
from loraseg.tensor_types import UInt8, ndarray
from loraseg.train.core.threads import fixed_threads

__all__ = ["ReplayedImage", "Replayer"]


@dataclass(frozen=True, slots=True, eq=False)
class ReplayedImage:
    """A pair and its regenerated image.

    Attributes:
        row: Row of the dataset.
        image: RGB image.
        differing_pixels: Number of pixels that differ from the stored image; 0 on the same
            processor with the same libraries and number of threads.
    """

    row: PairRow
    image: UInt8[ndarray, "h w 3"]
    differing_pixels: int


class Replayer:
    """Regenerates images of a dataset. Loads the generator once; one thread at a time."""

    def __init__(self, dataset: ShardDataset) -> None:
        """Read the run state of the dataset.

        Raises:
            DatasetError: There is none.
            IntegrityError: ``dataset.json`` is damaged.
            StoreError: The store cannot be read.
        """
        state = read_run_state(dataset.store)
        if state is None:
            raise DatasetError(f"{dataset.store.uri}: no dataset.json, so nothing can be replayed")
        self._dataset, self._state = dataset, state
        self._generator: Generator | None = None

    def __call__(self, pair_id: str) -> ReplayedImage:
        """Regenerate the image of a pair.

        The other images of its batch are generated as well: sums in another batch differ in their
        last bits.

        Args:
            pair_id: The id, or the first digits of it.

        Raises:
            DatasetError: No pair has this id, or several do.
            ConfigError: A model has changed since.
            IntegrityError: The row is damaged.
            LorasegError: As raised by library, store and models.
        """
        row = self._dataset.find_pair(pair_id)
        first, last = _batch_range(row)
        if row.mask is None or row.image is None or row.k is None:
            raise IntegrityError(f"pair {row.pair_id}: no mask, no image or no image number")
        where = f"pair {row.pair_id}"
        mask = decode_mask(row.mask, where=where, classes=len(self._state.classes))
        with fixed_threads(self._state.threads):
            generator = self._load_generator(last + 1)
            images = list(generator.generate([(row.mask_name, mask)], first=first))
        replayed = images[row.k - first]
        if replayed.lineage.pair_id != row.pair_id:
            raise IntegrityError(
                f"{where}: mask and generator make pair {replayed.lineage.pair_id}; the row is "
                "damaged"
            )
        stored = decode_image(row.image)
        differs = replayed.image.shape != stored.shape or (replayed.image != stored).any(-1)
        return ReplayedImage(row, replayed.image, int(np.sum(differs)))

    def _load_generator(self, images: int) -> Generator:
        if self._generator is None:
            self._generator = load_generator(self._state)
        # A run that appended images had another number of images per mask.
        self._generator.config = replace(self._generator.config, images=images)
        return self._generator


def _batch_range(row: PairRow) -> tuple[int, int]:
    try:
        first, last = json.loads(row.lineage or "")["batch"]
        if not 0 <= first <= (row.k or 0) <= last < 10_000:
            raise ValueError(f"images {first} to {last}")
    except MALFORMED_INPUT_ERRORS as error:
        raise IntegrityError(
            f"pair {row.pair_id}: its lineage has no valid batch: {error}"
        ) from error
    return int(first), int(last)
