"""Few-shot subsets by seed."""

from collections.abc import Sequence

from loraseg.data.datasets import Sample
from loraseg.errors import DatasetError
from loraseg.seeding import derive

__all__ = ["few_shot"]


def few_shot(
    samples: Sequence[Sample], count: int, seed: int, *keys: str | int
) -> tuple[Sample, ...]:
    """Choose ``count`` samples by seed, independent of their order.

    The rank of a sample depends only on its id, so 5 samples are the first 5 of 10, and an
    additional image displaces at most one chosen image.

    Args:
        samples: The candidates; ids must differ.
        count: Number of samples, at least 1.
        seed: The user's seed.
        keys: The purpose of the choice, such as the name of the dataset.

    Raises:
        DatasetError: There are fewer than ``count`` samples, or two of one id.
    """
    if not 1 <= count <= len(samples):
        raise DatasetError(f"cannot choose {count} of {len(samples)} images")
    if len({sample.id for sample in samples}) != len(samples):
        raise DatasetError("two of the samples to choose from have the same id")
    return tuple(
        sorted(samples, key=lambda sample: (derive(seed, "few-shot", *keys, sample.id), sample.id))
    )[:count]
