"""The order in which training data pass: in rounds, without any state between steps."""

from collections.abc import Sequence

from loraseg.data import Dataset, Sample
from loraseg.errors import DatasetError
from loraseg.seeding import numpy_generator

__all__ = ["require_labels", "shuffled_index"]


def shuffled_index(position: int, count: int, seed: int, *keys: str | int) -> int:
    """Return which of ``count`` items comes at a position of an endless sequence.

    Every item comes once a round, in an order drawn for that round, so that the answer is a
    function of the arguments alone.
    """
    round_, place = divmod(position, count)
    return int(numpy_generator(seed, *keys, "order", round_).permutation(count)[place])


def require_labels(dataset: Dataset, samples: Sequence[Sample]) -> None:
    """Make sure that there is something to train on.

    Raises:
        DatasetError: There is no sample, or one has no mask.
    """
    unlabelled = [sample.id for sample in samples if sample.mask is None]
    if not samples or unlabelled:
        raise DatasetError(
            f"{dataset.location}: expected labelled training images, got {len(samples)} images, "
            f"{len(unlabelled)} without a mask"
        )
