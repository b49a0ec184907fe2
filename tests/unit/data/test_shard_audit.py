from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from loraseg.data.shard_audit import audit_shards
from loraseg.data.shard_manifest import read_manifest
from loraseg.data.shard_reader import ShardDataset
from loraseg.data.shards import encode_shard, rows_digest
from loraseg.storage import open_store
from tests.unit.data.shard_world import CLASSES, bad_mask, commit, pair, pair_id, png, world

SETTINGS = b"{}\n"


def seal(uri):
    """Write ``dataset.json``, and a manifest that names it."""
    store = open_store(str(uri))
    store.put("dataset.json", SETTINGS)
    manifest = replace(read_manifest(store)[0], dataset_sha256=sha256(SETTINGS).hexdigest())
    store.put("manifest.json", manifest.to_bytes())
    return ShardDataset.open(store)


def test_a_whole_dataset_has_no_problems(tmp_path):
    world(tmp_path)
    audit = audit_shards(seal(tmp_path))
    dataset = ShardDataset.open(str(tmp_path))
    rows = dataset.rows(statuses=("ok", "dropped", "bad_mask", "duplicate"))
    assert (audit.rows, audit.problems, audit.uncommitted) == (16, (), ())
    assert audit.digest == rows_digest(rows)


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([[pair(0)], [pair(0)]], f"pair {pair_id(0)} is in another shard"),
        ([[pair(0), pair(1, image=b"no image at all")]], f"pair {pair_id(1)}: the image is"),
        ([[pair(0, predicted=png(np.zeros((6, 9), np.uint8)))]], "of another size"),
        ([[pair(0, mask=png(np.full((6, 8), 3, np.uint8)))]], "the label has id 3"),
        ([[pair(0, label=png(np.zeros((5, 8), np.uint8)))]], "8 x 5 pixels, not 8 x 6"),
    ],
)
def test_damage_is_told_and_the_rest_still_read(tmp_path, shards, expected):
    commit(tmp_path, [*shards, [bad_mask("x")]])
    audit = audit_shards(seal(tmp_path))
    assert [expected in problem for problem in audit.problems] == [True]
    assert audit.rows == sum(map(len, shards)) + 1
    assert audit.digest is None


def test_a_broken_shard_does_not_hide_another(tmp_path):
    world(tmp_path)
    dataset = seal(tmp_path)
    (tmp_path / "shards" / "0000.parquet").unlink()
    path = tmp_path / "shards" / "0002.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    problems = audit_shards(dataset).problems
    assert ["0000.parquet: the manifest" in problems[0], "0002.parquet: sha" in problems[1]] == [
        True,
        True,
    ]


def test_settings_belong_to_the_manifest(tmp_path):
    world(tmp_path)
    assert "dataset.json: is missing" in audit_shards(ShardDataset.open(str(tmp_path))).problems[0]
    dataset = seal(tmp_path)
    (tmp_path / "dataset.json").write_bytes(b"[]")
    assert "is not the one" in audit_shards(dataset).problems[0]


def test_what_is_not_committed_is_no_damage(tmp_path):
    world(tmp_path)
    dataset = seal(tmp_path)
    (tmp_path / "shards" / "ffff.parquet").write_bytes(encode_shard([pair(99)], CLASSES))
    audit = audit_shards(dataset)
    assert (audit.problems, audit.uncommitted) == ((), ("shards/ffff.parquet",))
