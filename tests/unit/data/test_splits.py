import numpy as np
import pytest

from loraseg.data.datasets import Sample
from loraseg.data.splits import few_shot
from loraseg.errors import DatasetError

SAMPLES = tuple(Sample(f"{index:04d}", f"{index:04d}.png", None) for index in range(60))


def test_independent_of_the_listing_order():
    shuffled = [SAMPLES[index] for index in np.random.default_rng(0).permutation(60)]
    assert few_shot(shuffled, 10, 3, "fog") == few_shot(SAMPLES, 10, 3, "fog")


def test_smaller_choices_are_the_start_of_larger_ones():
    ten = few_shot(SAMPLES, 10, 3)
    for count in range(1, 10):
        assert few_shot(SAMPLES, count, 3) == ten[:count]
    assert set(few_shot(SAMPLES, 60, 3)) == set(SAMPLES)


def test_one_more_image_displaces_at_most_one():
    before = set(few_shot(SAMPLES[:-1], 10, 3))
    after = set(few_shot(SAMPLES, 10, 3))
    assert len(before - after) <= 1


def test_seed_and_keys_change_the_choice_and_all_images_are_equally_likely():
    choices = {few_shot(SAMPLES, 5, seed, *keys) for seed in range(3) for keys in ((), ("a",))}
    assert len(choices) == 6
    counts = np.zeros(60)
    for seed in range(600):  # each image is expected 100 times, standard deviation about 9
        for sample in few_shot(SAMPLES, 10, seed):
            counts[int(sample.id)] += 1
    assert np.abs(counts - 100).max() < 5 * 9.2


@pytest.mark.parametrize("count", [0, -1, 61])
def test_refuses_impossible_counts(count):
    with pytest.raises(DatasetError, match=f"cannot choose {count} of 60 images"):
        few_shot(SAMPLES, count, 0)


def test_refuses_double_ids():
    with pytest.raises(DatasetError, match="same id"):
        few_shot([*SAMPLES, SAMPLES[0]], 5, 0)
