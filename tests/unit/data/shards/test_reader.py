import json
import pickle
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from loraseg.data.shards.pictures import decode_label, decode_pair, encode_label, ignore_id
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import PairRow, encode_shard
from loraseg.data.shards.torch_stream import ShardStream
from loraseg.errors import ConfigError, DatasetError, IntegrityError
from loraseg.storage import LocalStore, open_store
from tests.unit.data.shards.sample_dataset import (
    CLASSES,
    commit_sample_dataset,
    commit_shards,
    make_pair,
    pair_id,
    png_bytes,
    random_arrays,
)

ALL = ("ok", "dropped", "bad_mask", "duplicate")


@pytest.fixture
def dataset(tmp_path):
    commit_sample_dataset(tmp_path)
    return ShardDataset.open(str(tmp_path))


def test_ok_pairs_are_complete_and_in_order(dataset):
    rows = list(dataset.rows())
    assert [astuple(row) for row in rows] == [astuple(make_pair(index)) for index in range(12)]
    assert len(dataset) == 12
    assert dataset.classes.names == CLASSES
    for index, row in enumerate(rows):
        image, label = decode_pair(row, 3, "x")
        np.testing.assert_array_equal(image, random_arrays(index)[0])
        np.testing.assert_array_equal(label, random_arrays(index)[1])


def test_other_statuses_are_there_when_asked_for(dataset):
    assert len(list(dataset.rows(statuses=ALL))) == 16
    assert [row.mask_name for row in dataset.rows(statuses=("bad_mask", "duplicate"))] == [
        "broken.png",
        "twice.png",
    ]


def test_a_snapshot_does_not_see_later_commits(dataset, tmp_path):
    commit_shards(tmp_path, [[make_pair(500)]])
    assert len(dataset) == 12
    assert len(ShardDataset.open(str(tmp_path))) == 1


def test_orphans_are_invisible(dataset, tmp_path):
    (tmp_path / "shards" / "ffff.parquet").write_bytes(encode_shard([make_pair(900)], CLASSES))
    assert pair_id(900) not in {row.pair_id for row in dataset.rows(statuses=ALL)}
    with pytest.raises(DatasetError, match="no pair"):
        dataset.find_pair(pair_id(900))


def test_nothing_committed_is_no_dataset(tmp_path):
    (tmp_path / "shards").mkdir()
    with pytest.raises(DatasetError, match="no synthetic data is committed"):
        ShardDataset.open(str(tmp_path))


def test_a_changed_shard_is_detected_if_verified(dataset, tmp_path):
    path = tmp_path / "shards" / "0002.parquet"
    data = path.read_bytes()
    place = data.index(b"IDAT") + 6
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(IntegrityError, match=r"0002\.parquet: sha256"):
        list(dataset.rows())
    assert len(list(dataset.rows(verify=False))) == 12


@pytest.mark.parametrize("change", ["gone", "short", "rows", "classes"])
def test_another_shard_than_the_manifest_says_is_refused(tmp_path, change):
    manifest = commit_shards(tmp_path, [[make_pair(0), make_pair(1)]])
    path = tmp_path / manifest.shards[0].file
    if change == "gone":
        path.unlink()
    elif change == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        other = tmp_path / "other"
        rows, classes = [make_pair(0), make_pair(1)], CLASSES
        if change == "rows":
            rows = [make_pair(0), make_pair(1, status="dropped", reason="x")]
        else:
            classes = ("sky", "road", "cat")
        commit_shards(other, [rows], classes)
        text = json.loads((other / "manifest.json").read_text())
        text["classes"] = list(CLASSES)
        text["shards"][0]["statuses"] = text["statuses"] = dict(zip(ALL, (2, 0, 0, 0), strict=True))
        text["pairs"] = 2
        (tmp_path / "manifest.json").write_text(json.dumps(text))
        path.write_bytes((other / manifest.shards[0].file).read_bytes())
    with pytest.raises(IntegrityError, match=r"0000\.parquet: "):
        list(ShardDataset.open(str(tmp_path)).rows(verify=False))


def test_find_takes_a_prefix_that_is_clear(dataset):
    ids = [row.pair_id for row in dataset.rows(statuses=ALL) if row.pair_id]
    for wanted in (ids[0], ids[-1]):
        shortest = next(n for n in range(1, 65) if sum(i.startswith(wanted[:n]) for i in ids) == 1)
        assert dataset.find_pair(wanted[:shortest]).pair_id == wanted
    assert dataset.find_pair(pair_id(101)).status == "dropped"
    with pytest.raises(DatasetError, match="is not clear"):
        dataset.find_pair("")
    with pytest.raises(DatasetError, match="no pair 'zz'"):
        dataset.find_pair("zz")


def test_it_travels_between_processes(dataset):
    other = pickle.loads(pickle.dumps(dataset))
    assert [row.pair_id for row in other.rows()] == [row.pair_id for row in dataset.rows()]


def test_columns_that_are_not_asked_for_are_empty(dataset):
    row = next(dataset.rows(columns=("k", "adapters")))
    assert (row.k, row.adapters, row.image, row.heads) == (0, make_pair(0).adapters, None, ())
    with pytest.raises(DatasetError, match="no column 'nose'"):
        next(dataset.rows(columns=("nose",)))


class CountingStore(LocalStore):
    """A folder that counts what is read."""

    def __init__(self, root):
        super().__init__(root)
        self.read = []

    def get(self, key):
        self.read.append(key)
        return super().get(key)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (3, 0), (2, 2)])
def test_every_pair_once_over_ranks_and_workers(dataset, world_size, workers):
    seen = []
    for rank in range(world_size):
        stream = ShardStream(dataset, seed=3, buffer_size=4, rank=rank, world_size=world_size)
        loader = DataLoader(stream, batch_size=2, num_workers=workers)
        mine = [name for batch in loader for name in batch["pair_id"]]
        assert abs(len(mine) - 12 / world_size) < workers + 1
        seen += mine
    assert sorted(seen) == sorted(map(pair_id, range(12)))


def test_more_consumers_than_pairs(tmp_path):
    commit_shards(tmp_path, [[make_pair(0)], [make_pair(1)]])
    streams = [
        ShardStream(ShardDataset.open(str(tmp_path)), rank=r, world_size=5) for r in range(5)
    ]
    assert sorted(item["pair_id"] for s in streams for item in s) == sorted(map(pair_id, (0, 1)))


def test_the_stream_is_shuffled_by_seed_and_epoch(dataset):
    def order(seed, epoch, buffer=12):
        stream = ShardStream(dataset, seed=seed, buffer_size=buffer)
        stream.set_epoch(epoch)
        return [item["pair_id"] for item in stream]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    # Without a buffer only whole shards change places.
    first = list(map(pair_id, range(7)))
    rest = list(map(pair_id, range(7, 12)))
    assert {tuple(order(seed, 0, 1)) for seed in range(12)} == {(*first, *rest), (*rest, *first)}


def test_stream_items_are_arrays_of_the_pair(dataset):
    by_id = {item["pair_id"]: item for item in ShardStream(dataset)}
    for index in range(12):
        image, label = random_arrays(index)
        np.testing.assert_array_equal(by_id[pair_id(index)]["image"], image)
        np.testing.assert_array_equal(by_id[pair_id(index)]["label"], label)
    batch = next(iter(DataLoader(ShardStream(dataset), batch_size=4)))
    assert batch["image"].dtype == batch["label"].dtype == torch.uint8
    assert batch["image"].shape == (4, 6, 8, 3)


def test_a_consumer_reads_only_the_shards_of_its_stretch(tmp_path):
    commit_shards(tmp_path, [[make_pair(4 * n + i) for i in range(4)] for n in range(8)])
    dataset = ShardDataset.open(str(tmp_path))
    dataset.store = CountingStore(Path(tmp_path))
    assert len(list(ShardStream(dataset, rank=1, world_size=4))) == 8
    assert len(dataset.store.read) == 2


def test_a_stream_needs_sensible_numbers(dataset):
    for wrong in ({"buffer_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}):
        with pytest.raises(ConfigError, match="shard stream"):
            ShardStream(dataset, **wrong)


def test_wide_labels_take_16_bits(tmp_path):
    classes = tuple(f"class {n}" for n in range(300))
    commit_shards(tmp_path, [[make_pair(0, classes=300)]], classes)
    dataset = ShardDataset.open(str(tmp_path))
    item = next(iter(ShardStream(dataset)))
    np.testing.assert_array_equal(item["label"], random_arrays(0, classes=300)[1])
    assert item["label"].dtype == np.uint16
    with pytest.raises(DatasetError, match="1 to 255 classes"):
        _ = dataset.classes


@pytest.mark.parametrize("classes", [3, 255, 256, 65_535])
def test_labels_come_back(classes):
    draw = np.random.default_rng(classes)
    ignore = ignore_id(classes)
    dtype = np.uint8 if classes <= 255 else np.uint16
    labels = draw.integers(classes, size=(20, 30)).astype(dtype)
    labels[0], labels[1] = ignore, classes - 1
    data = encode_label(labels, [f"c{n}" for n in range(classes)])
    back = decode_label(data, classes)
    np.testing.assert_array_equal(back, labels)
    assert (back.dtype, ignore) == (dtype, 255 if classes <= 255 else 65_535)


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(DatasetError, match="id 5"):
        decode_label(png_bytes(np.full((2, 2), 5, np.uint8)), 5)
    with pytest.raises(DatasetError, match="id 65535"):
        encode_label(np.full((2, 2), 65_535, np.uint16), CLASSES)
    with pytest.raises(DatasetError, match="expected uint8 or uint16"):
        encode_label(np.zeros((2, 2), np.int64), CLASSES)


def huge_png(width, height):
    head = bytearray(png_bytes(np.zeros((2, 2), np.uint8)))
    head[16:24] = width.to_bytes(4) + height.to_bytes(4)
    return bytes(head)


HOSTILE = {
    "nothing": b"",
    "text": b"<svg/>" * 10,
    "cut off": png_bytes(np.zeros((6, 8), np.uint8))[:40],
    "huge": huge_png(100_000, 100_000),
    "colours": png_bytes(np.zeros((6, 8, 3), np.uint8)),
    "16 bits": png_bytes(np.zeros((6, 8), np.uint16)),
    "other size": png_bytes(np.zeros((6, 9), np.uint8)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_labels_in_a_shard_are_named(tmp_path, what):
    commit_shards(tmp_path, [[make_pair(0), make_pair(1, label=HOSTILE[what])]])
    with pytest.raises(IntegrityError, match=f"pair {pair_id(1)}: "):
        list(ShardStream(ShardDataset.open(str(tmp_path)), buffer_size=1))


@pytest.mark.parametrize("what", ["nothing", "text", "cut off", "huge", "other size"])
def test_hostile_images_in_a_shard_are_named(tmp_path, what):
    commit_shards(tmp_path, [[make_pair(0), make_pair(1, image=HOSTILE[what])]])
    with pytest.raises(IntegrityError, match=f"pair {pair_id(1)}: "):
        list(ShardStream(ShardDataset.open(str(tmp_path)), buffer_size=1))


def test_it_opens_a_store_too(tmp_path):
    commit_sample_dataset(tmp_path)
    opened = ShardDataset.open(open_store(str(tmp_path)))
    assert isinstance(next(opened.rows()), PairRow)
