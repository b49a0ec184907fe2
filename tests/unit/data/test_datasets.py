"""Helpers over any dataset, and training data from a reader that has no files."""

import dataclasses
import hashlib

import numpy as np
import pytest

from loraseg.data import (
    AugmentConfig,
    Dataset,
    digest_samples,
    few_shot,
    load_pair,
    open_dataset,
)
from loraseg.data.datasets import check_samples
from loraseg.errors import DatasetError
from loraseg.train.closed_set.data_spec import select_samples
from loraseg.train.closed_set.samples import FolderPairs
from loraseg.train.generator_adapters.crops import CroppedImages, ViewConfig
from loraseg.train.segmenter_adapters.samples import TrainingImages
from loraseg.train.segmenter_adapters.validation import mean_iou
from tests.tiny_training import write_domain
from tests.unit.data.memory_dataset import MemoryDataset, memory_copy
from tests.unit.tiny import tiny_base

IMAGE = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
LABEL_MAP = np.zeros((6, 8), np.uint8)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """One domain as a folder and in memory."""
    folder: Dataset = open_dataset(write_domain(tmp_path_factory.mktemp("set") / "fog", "fog"))
    return folder, memory_copy(folder)


def test_pairs_need_a_mask_of_the_size_of_the_image():
    rows = [(IMAGE, LABEL_MAP), (IMAGE, LABEL_MAP[:5]), (IMAGE, None)]
    dataset = MemoryDataset(("road",), {"train": rows})
    good, cut, unlabelled = dataset.samples("train")
    image, label_map = load_pair(dataset, good)
    assert image is IMAGE
    assert label_map is LABEL_MAP
    with pytest.raises(DatasetError, match=r"row 1: 8 x 5 pixels; expected 8 x 6 .* image row 1"):
        load_pair(dataset, cut)
    with pytest.raises(DatasetError, match="row 2: has no mask"):
        load_pair(dataset, unlabelled)
    check_samples(dataset, [good, unlabelled])
    with pytest.raises(DatasetError, match="row 1"):
        check_samples(dataset, [good, cut])


def test_digest_is_over_names_ids_and_content():
    dataset = MemoryDataset(("road", "sky"), {"train": [(IMAGE, LABEL_MAP), (IMAGE, None)]})
    image, label_map = (hashlib.sha256(data.tobytes()).hexdigest() for data in (IMAGE, LABEL_MAP))
    text = f'[["road","sky"],[["0000","{image}","{label_map}"],["0001","{image}",null]]]'
    samples = dataset.samples("train")
    for order in (samples, samples[::-1]):
        assert digest_samples(dataset, order) == hashlib.sha256(text.encode()).hexdigest()


def test_selections_work_on_any_reader(datasets):
    _, memory = datasets
    samples = memory.samples("train")
    assert set(few_shot(samples, 2, 3)) < set(samples)
    assert select_samples(memory, "train", 2) == samples[:2]
    assert select_samples(memory, "train", ("0003",)) == samples[3:]


def test_adapter_training_sees_the_same_batches(datasets):
    config = AugmentConfig(crop=24, shortest_edge=(24, 32))
    folder, memory = (
        TrainingImages(dataset, dataset.samples("train"), config, keys=("a",))
        for dataset in datasets
    )
    for step in range(3):
        for expected, actual in zip(folder.batch(step, 3), memory.batch(step, 3), strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_generator_training_sees_the_same_crops(datasets):
    config = ViewConfig(size=(32, 32), fit="resize")
    folder, memory = (
        CroppedImages(dataset, dataset.samples("train"), config) for dataset in datasets
    )
    for expected, actual in zip(folder.crops, memory.crops, strict=True):
        for one, other in zip(folder.load(expected), memory.load(actual), strict=True):
            np.testing.assert_array_equal(other, one)
    crop = memory.crops[0]
    assert memory.fingerprint(crop)["image"] == datasets[1].digest(crop.sample)[0]


def test_segmenter_training_sees_the_same_pairs(datasets):
    folder, memory = (FolderPairs(dataset, dataset.samples("train")) for dataset in datasets)
    for position in range(4):
        for expected, actual in zip(
            folder.load(0, position), memory.load(0, position), strict=True
        ):
            np.testing.assert_array_equal(actual, expected)


def test_validation_gives_the_same_score(datasets):
    base = tiny_base()
    scores = [mean_iou(base, dataset, dataset.samples("val"), None) for dataset in datasets]
    assert scores[0] == scores[1]


def test_training_refuses_unlabelled_samples(datasets):
    _, memory = datasets
    samples = [dataclasses.replace(sample, mask=None) for sample in memory.samples("train")]
    with pytest.raises(DatasetError, match=r"memory: .* got 4 images, 4 without a mask"):
        TrainingImages(memory, samples, AugmentConfig())
    with pytest.raises(DatasetError, match="memory: sample '0000' has no mask"):
        FolderPairs(memory, samples)
