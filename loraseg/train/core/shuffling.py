"""The order of training samples: shuffled epochs, without state between steps."""

from collections.abc import Sequence

from loraseg.data import Dataset, Sample
from loraseg.errors import DatasetError
from loraseg.seeding import numpy_generator

__all__ = ["require_labels", "shuffled_index"]


def shuffled_index(position: int, count: int, seed: int, *keys: str | int) -> int:
    """Return the item at a position of an endless sequence of shuffled epochs.

    Every item occurs once per epoch, in an order drawn for that epoch. The result depends on the
    arguments only.

    Args:
        position: Position in the sequence, from 0.
        count: Number of items.
        seed: The seed.
        keys: Keys of the random stream beside the seed.
    """
    epoch, index = divmod(position, count)
    return int(numpy_generator(seed, *keys, "order", epoch).permutation(count)[index])


def require_labels(dataset: Dataset, samples: Sequence[Sample]) -> None:
    """Check that there are samples and that all of them have masks.

    Raises:
        DatasetError: There is no sample, or one has no mask.
    """
    unlabelled = [sample.id for sample in samples if sample.mask is None]
    if not samples or unlabelled:
        raise DatasetError(
            f"{dataset.location}: expected labelled training images, got {len(samples)} images, "
            f"{len(unlabelled)} without a mask"
        )
