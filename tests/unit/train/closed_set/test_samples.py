from collections import Counter

import numpy as np
import pytest

from loraseg.data import load_pair, open_dataset
from loraseg.data.labels import LabelSpace
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import ConfigError, DatasetError
from loraseg.train.closed_set import samples as closed_set_samples
from loraseg.train.closed_set.recipes import named_segmenter_recipe
from loraseg.train.closed_set.samples import (
    ArrayPairs,
    BatchDataset,
    FolderPairs,
    MixedSampler,
    ShardPairs,
    class_shares,
)
from tests.tiny_training import write_domain
from tests.unit.train.closed_set.tiny_datasets import commit_pairs, numbered_pairs

_SPACE = LabelSpace(("road", "car", "sky"))


def _recipe(**changes):
    plain = {"crop": 8, "flip": 0.0, "batch_size": 4, "steps": 50, "eval_every": 50}
    return named_segmenter_recipe("unet-miniature", {**plain, **changes})


def _array(count, start=0):
    """Pairs whose pixels hold the number of the pair."""
    images = [np.full((8, 8, 3), start + i, np.uint8) for i in range(count)]
    return ArrayPairs(images, [np.zeros((8, 8), np.uint8)] * count)


def _number(pair):
    return int(pair[0][0, 0, 0])


@pytest.mark.parametrize(
    ("share", "batch", "expected"),
    [(0.5, 4, 2), (0.5, 5, 3), (0.0, 4, 0), (1.0, 4, 4), (0.25, 6, 2), (0.1, 4, 0)],
)
def test_every_batch_has_its_share_of_synthetic_pairs(share, batch, expected):
    recipe = _recipe(synthetic_share=share, batch_size=batch)
    sampler = MixedSampler(recipe, _array(5), _array(7, start=100), seed=1)
    for step in range(20):
        numbers = [_number(sampler.pair(step, index)) for index in range(batch)]
        assert sum(number >= 100 for number in numbers) == expected
        assert [sampler.is_synthetic(i) for i in range(batch)] == [n >= 100 for n in numbers]


def test_without_synthetic_pairs_every_batch_is_real():
    sampler = MixedSampler(_recipe(), _array(5), None, seed=1)
    assert not any(sampler.is_synthetic(index) for index in range(4))
    assert all(_number(sampler.pair(0, index)) < 5 for index in range(4))


def test_each_epoch_has_every_pair_once_in_another_order():
    sampler = MixedSampler(_recipe(batch_size=2), _array(6), _array(9, start=100), seed=3)
    real = [_number(sampler.pair(step, 0)) for step in range(24)]
    synthetic = [_number(sampler.pair(step, 1)) for step in range(27)]
    epochs = [real[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert all(sorted(synthetic[i : i + 9]) == list(range(100, 109)) for i in (0, 9, 18))


def test_a_step_does_not_depend_on_the_order_of_access():
    def drawn(steps):
        sampler = MixedSampler(_recipe(), _array(5), _array(7, start=100), seed=1)
        return {step: [_number(sampler.pair(step, i)) for i in range(4)] for step in steps}

    forwards = drawn(range(12))
    assert drawn(reversed(range(12))) == forwards
    assert drawn([9]) == {9: forwards[9]}
    other = MixedSampler(_recipe(), _array(5), _array(7, start=100), seed=2)
    assert [_number(other.pair(0, i)) for i in range(4)] != forwards[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_divide_a_batch(world):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (12, 15, 3), dtype=np.uint8) for _ in range(9)]
    labels = [rng.integers(0, 3, (12, 15), dtype=np.uint8) for _ in range(9)]
    recipe = _recipe(flip=0.5, jitter=True, scales=(0.7, 1.5))
    pairs = ArrayPairs(images, labels)

    def batch(step, rank, world):
        sampler = MixedSampler(recipe, pairs, pairs, seed=5)
        return BatchDataset(recipe, sampler, 5, rank, world)[step]

    whole = batch(7, 0, 1)
    assert whole[0].shape == (4, 8, 8, 3)
    assert whole[1].shape == (4, 8, 8)
    for rank in range(world):
        part = batch(7, rank, world)
        assert (part[0] == whole[0][rank::world]).all()
        assert (part[1] == whole[1][rank::world]).all()


def test_a_batch_must_split_evenly():
    sampler = MixedSampler(_recipe(), _array(5), None, seed=1)
    with pytest.raises(ConfigError, match="batch_size 4 cannot be split over 3"):
        BatchDataset(_recipe(), sampler, 1, 0, 3)


def test_augmentation_transforms_image_and_label_equally():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (30, 40), dtype=np.uint8)
    pairs = ArrayPairs([np.repeat(label[:, :, None], 3, 2) * 100], [label])
    recipe = _recipe(crop=16, flip=0.5, batch_size=1)
    batches = BatchDataset(recipe, MixedSampler(recipe, pairs, None, 0), 0, 0, 1)
    seen = set()
    for step in range(10):
        image, moved = batches[step]
        assert (image[0, :, :, 0] == moved[0] * 100).all()
        seen.add(moved.numpy().tobytes())
    assert len(seen) == 10


def test_small_images_are_padded_by_ignored_pixels():
    recipe = _recipe(crop=12, batch_size=1)
    batches = BatchDataset(recipe, MixedSampler(recipe, _array(3), None, 0), 0, 0, 1)
    _, label = batches[0]
    assert (label[0, :8, :8] == 0).all()
    assert (label == 255).sum() == 12 * 12 - 8 * 8


def test_shards_of_several_datasets_in_windows(tmp_path, monkeypatch):
    first = commit_pairs(tmp_path / "a", numbered_pairs(0, 7), _SPACE.names, rows_a_shard=3)
    # Other classes in another order: matched by name, unknown ones ignored.
    second = commit_pairs(
        tmp_path / "b", numbered_pairs(7, 12), ("sky", "tree", "road"), rows_a_shard=2
    )
    monkeypatch.setattr(closed_set_samples, "_WINDOW_BYTES", 6000)
    pairs = ShardPairs([first, second], _SPACE)
    assert len(pairs.windows) > 2
    assert sum(map(sum, pairs.windows)) == 12
    sampler = MixedSampler(_recipe(synthetic_share=1.0), _array(1), pairs, seed=2)
    drawn = [sampler.pair(step, index) for step in range(9) for index in range(4)]
    counts = Counter(_number(pair) for pair in drawn)
    assert counts == dict.fromkeys(range(12), 3)
    for image, label in drawn:
        number = int(image[0, 0, 0])
        expected = number % 3 if number < 7 else {0: 2, 1: 255, 2: 0}[number % 3]
        assert (label[1:] == expected).all()
        assert (label[0] == 255).all()


def test_shards_are_read_once_per_epoch(tmp_path, monkeypatch):
    dataset = commit_pairs(tmp_path, numbered_pairs(0, 12), _SPACE.names, rows_a_shard=2)
    monkeypatch.setattr(closed_set_samples, "_WINDOW_BYTES", 1)
    read = []
    original = ShardDataset.read_shard
    monkeypatch.setattr(
        ShardDataset,
        "read_shard",
        lambda self, entry, **kw: read.append(entry.file) or original(self, entry, **kw),
    )
    sampler = MixedSampler(
        _recipe(synthetic_share=1.0), _array(1), ShardPairs([dataset], _SPACE), seed=2
    )
    for step in range(6):
        for index in range(4):
            sampler.pair(step, index)
    assert Counter(read) == dict.fromkeys({entry.file for entry in dataset.manifest.shards}, 2)


def test_unusable_datasets_are_refused(tmp_path):
    dataset = commit_pairs(tmp_path / "a", numbered_pairs(0, 2), ("soil", "crop", "weed"))
    with pytest.raises(DatasetError, match="none of its classes"):
        ShardPairs([dataset], _SPACE)
    with pytest.raises(DatasetError, match="no pair"):
        ShardPairs([], _SPACE)
    with pytest.raises(DatasetError, match="1 images and 0 labels"):
        ArrayPairs([np.zeros((2, 2, 3), np.uint8)], [])


def test_the_cache_of_folder_pairs_is_bounded(tmp_path, monkeypatch):
    folder = open_dataset(write_domain(tmp_path, "fog"))
    samples = folder.samples("train")
    monkeypatch.setattr(closed_set_samples, "_CACHE_BYTES", 1)
    pairs = FolderPairs(folder, samples)
    for _ in range(2):
        for place, sample in enumerate(samples):
            image, label = pairs.load(0, place)
            assert (image == load_pair(folder, sample)[0]).all()
            assert (label == load_pair(folder, sample)[1]).all()
    with pytest.raises(DatasetError, match="no samples"):
        FolderPairs(folder, [])


def test_class_shares_count_labelled_pixels():
    label = np.array([[0, 0, 2], [255, 2, 2]], np.uint8)
    pairs = ArrayPairs([np.zeros((2, 3, 3), np.uint8)] * 2, [label, np.full((2, 3), 255, np.uint8)])
    np.testing.assert_allclose(class_shares(pairs, 3), [0.4, 0, 0.6])
