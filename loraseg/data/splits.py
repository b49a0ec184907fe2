"""Few-shot subsets by seed."""

from collections.abc import Sequence

from loraseg.data.datasets import Sample
from loraseg.errors import DatasetError
from loraseg.seeding import derive

__all__ = ["few_shot"]


def few_shot(
    samples: Sequence[Sample], count: int, seed: int, *keys: str | int
) -> tuple[Sample, ...]:
    """Choose ``count`` samples by seed, whatever the order they are listed in.

    Each sample's rank is drawn from its own id, so the choice of 5 is the start of the choice of
    10, and one image more in the folder displaces at most one chosen image.

    Args:
        samples: What to choose from; ids must differ.
        count: How many, at least 1.
        seed: The user's seed.
        keys: What the choice is for, such as the data set's name.

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
