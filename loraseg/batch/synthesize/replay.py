"""Make one pair's image again, from what the dataset says of it."""

import json
from dataclasses import dataclass, replace

import numpy as np
import torch

from loraseg.batch.synthesize.models import load_generator
from loraseg.batch.synthesize.state import SynthesisRunState, read_run_state
from loraseg.data.masks import decode_mask
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import PairRow
from loraseg.data.untrusted_images import decode_image
from loraseg.errors import MALFORMED_INPUT_ERRORS, DatasetError, IntegrityError
from loraseg.synth.generator import Generator
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["ReplayedImage", "Replayer"]


@dataclass(frozen=True, slots=True, eq=False)
class ReplayedImage:
    """A pair and its image, made again.

    Attributes:
        row: As in the dataset.
        image: Made again.
        differing_pixels: Pixels in which it differs from the stored one; 0 on the processor, with
            the libraries and with the number of threads that it was made with.
    """

    row: PairRow
    image: UInt8[ndarray, "h w 3"]
    differing_pixels: int


class Replayer:
    """Makes images of a dataset again. Loads the generator once; one thread at a time."""

    def __init__(self, dataset: ShardDataset) -> None:
        """Read what the dataset was begun with.

        Raises:
            DatasetError: The dataset does not say it.
            IntegrityError: ``dataset.json`` is damaged.
        """
        found = read_run_state(dataset.store)
        if found is None:
            raise DatasetError(f"{dataset.store.uri}: no dataset.json, so nothing can be replayed")
        self._dataset, self._state = dataset, found
        self._generator: Generator | None = None

    @property
    def run_state(self) -> SynthesisRunState:
        """What the dataset was begun with."""
        return self._state

    def __call__(self, pair_id: str) -> ReplayedImage:
        """Make the image of a pair again.

        Its siblings are made with it, as they were then: sums of another batch differ in their
        last bits.

        Args:
            pair_id: Or the beginning of it.

        Raises:
            DatasetError: There is no such pair, or several.
            ConfigError: A model has changed since.
            IntegrityError: The pair is damaged.
        """
        row = self._dataset.find_pair(pair_id)
        first, last = _batch_range(row)
        if row.mask is None or row.image is None or row.k is None:
            raise IntegrityError(f"pair {row.pair_id}: no mask, no image or no number")
        where = f"pair {row.pair_id}"
        mask = decode_mask(row.mask, where=where, classes=len(self._state.classes))
        threads = torch.get_num_threads()
        torch.set_num_threads(self._state.threads)
        try:
            generator = self._load_generator(last + 1)
            made = list(generator.generate([(row.mask_name, mask)], first=first))
        finally:
            torch.set_num_threads(threads)
        one = made[row.k - first]
        if one.lineage.pair_id != row.pair_id:
            raise IntegrityError(
                f"{where}: mask and generator make pair {one.lineage.pair_id}; the row is damaged"
            )
        stored = decode_image(row.image)
        differs = one.image.shape != stored.shape or (one.image != stored).any(-1)
        return ReplayedImage(row, one.image, int(np.sum(differs)))

    def _load_generator(self, images: int) -> Generator:
        if self._generator is None:
            self._generator = load_generator(self._state)
        # A run that made more images of each mask knew another K.
        self._generator.config = replace(self._generator.config, images=images)
        return self._generator


def _batch_range(row: PairRow) -> tuple[int, int]:
    try:
        first, last = json.loads(row.lineage or "")["batch"]
        if not 0 <= first <= (row.k or 0) <= last < 10_000:
            raise ValueError(f"images {first} to {last}")
    except MALFORMED_INPUT_ERRORS as error:
        raise IntegrityError(f"pair {row.pair_id}: its lineage names no batch: {error}") from error
    return int(first), int(last)
