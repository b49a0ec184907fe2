"""Committed shards as a Ray dataset, from a folder and from S3."""

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from actors.shards import ray_dataset
from loraseg.data.shards.schema import encode_shard
from loraseg.errors import DatasetError
from loraseg.storage import open_store
from tests.unit.data.shards.sample_dataset import (
    CLASSES,
    commit_sample_dataset,
    commit_shards,
    make_bad_mask,
    make_pair,
    pair_id,
    random_arrays,
)

pytestmark = [
    pytest.mark.ray,
    # Ray Data 2.60 uses settings and functions that it has deprecated.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\..*"),
]


@pytest.mark.usefixtures("ray_cluster")
def test_every_committed_pair_is_decoded_once(store_uri):
    commit_sample_dataset(store_uri)
    open_store(store_uri).put("shards/ffff.parquet", encode_shard([make_pair(99)], CLASSES))
    rows = {row["pair_id"]: row for row in ray_dataset(store_uri).iter_rows()}
    assert set(rows) == {pair_id(index) for index in range(12)}
    for index in range(12):
        row = rows[pair_id(index)]
        arrays = (row["image"], row["label"])
        for array, expected in zip(arrays, random_arrays(index), strict=True):
            np.testing.assert_array_equal(array, expected)
            assert array.dtype == np.uint8
        assert (row["k"], row["kept"]) == (index % 2, 0.75)


@pytest.mark.usefixtures("ray_cluster")
def test_batches_of_equal_sizes_are_arrays(tmp_path):
    commit_sample_dataset(tmp_path)
    batches = ray_dataset(str(tmp_path)).iter_batches(batch_size=4)
    assert [batch["image"].shape for batch in batches] == [(4, 6, 8, 3)] * 3


@pytest.mark.usefixtures("ray_cluster")
def test_a_damaged_shard_fails_the_run(tmp_path):
    commit_sample_dataset(tmp_path)
    path = tmp_path / "shards" / "0002.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(RayTaskError, match=r"0002\.parquet: sha256"):
        ray_dataset(str(tmp_path)).materialize()


def test_a_dataset_without_pairs_is_an_error(tmp_path):
    commit_shards(tmp_path, [[make_bad_mask("x")]])
    with pytest.raises(DatasetError, match="no pair is ok"):
        ray_dataset(str(tmp_path))
