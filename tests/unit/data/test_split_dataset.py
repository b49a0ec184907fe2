"""A split as a torch dataset: the pairs of the dataset, also in worker processes."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from loraseg.data import open_dataset
from loraseg.data.split_dataset import SplitDataset
from loraseg.errors import DatasetError
from tests.unit.data.memory_dataset import memory_copy
from tests.unit.tiny import write_domain


@pytest.fixture
def folder(tmp_path):
    return write_domain(tmp_path / "fog", "fog", count=4, split="train")


def test_items_are_the_pairs_of_the_split(folder):
    on_disk = open_dataset(folder)
    for source in (str(folder), folder, on_disk, memory_copy(on_disk)):
        items = SplitDataset(source, "train")
        samples = items.dataset.samples("train")
        assert len(items) == len(samples) == 4
        for index, sample in enumerate(samples):
            item = items[index]
            assert item["id"] == sample.id
            np.testing.assert_array_equal(item["image"], items.dataset.load_image(sample))
            np.testing.assert_array_equal(item["label"], items.dataset.load_label_map(sample))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_batches_images_of_one_size(folder, workers):
    items = SplitDataset(folder)
    batches = list(DataLoader(items, batch_size=2, num_workers=workers))
    assert [batch["image"].shape for batch in batches] == [(2, 20, 24, 3)] * 2
    assert torch.equal(batches[1]["label"][1], torch.from_numpy(items[3]["label"]))


def test_an_unknown_split_is_an_error(folder):
    with pytest.raises(DatasetError, match="test"):
        SplitDataset(folder, "test")
