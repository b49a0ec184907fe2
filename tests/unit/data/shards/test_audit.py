from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from loraseg.data.shards.audit import audit_shards
from loraseg.data.shards.manifest import read_manifest
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import encode_shard, rows_digest
from loraseg.storage import open_store
from tests.unit.data.shards.sample_dataset import (
    CLASSES,
    commit_sample_dataset,
    commit_shards,
    make_bad_mask,
    make_pair,
    pair_id,
    png_bytes,
)

SETTINGS = b"{}\n"


def write_settings(uri):
    """Write ``dataset.json``, and a manifest that names it."""
    store = open_store(str(uri))
    store.put("dataset.json", SETTINGS)
    manifest = replace(read_manifest(store)[0], dataset_sha256=sha256(SETTINGS).hexdigest())
    store.put("manifest.json", manifest.to_bytes())
    return ShardDataset.open(store)


def test_a_complete_dataset_has_no_problems(tmp_path):
    commit_sample_dataset(tmp_path)
    audit = audit_shards(write_settings(tmp_path))
    dataset = ShardDataset.open(str(tmp_path))
    rows = dataset.rows(statuses=("ok", "dropped", "bad_mask", "duplicate"))
    assert (audit.rows, audit.problems, audit.uncommitted) == (16, (), ())
    assert audit.digest == rows_digest(rows)


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([[make_pair(0)], [make_pair(0)]], f"pair {pair_id(0)} is in another shard"),
        (
            [[make_pair(0), make_pair(1, image=b"no image at all")]],
            f"pair {pair_id(1)}: the image is",
        ),
        ([[make_pair(0, predicted=png_bytes(np.zeros((6, 9), np.uint8)))]], "of another size"),
        ([[make_pair(0, mask=png_bytes(np.full((6, 8), 3, np.uint8)))]], "the label has id 3"),
        ([[make_pair(0, label=png_bytes(np.zeros((5, 8), np.uint8)))]], "8 x 5 pixels, not 8 x 6"),
    ],
)
def test_damage_is_reported_and_the_rest_is_read(tmp_path, shards, expected):
    commit_shards(tmp_path, [*shards, [make_bad_mask("x")]])
    audit = audit_shards(write_settings(tmp_path))
    assert [expected in problem for problem in audit.problems] == [True]
    assert audit.rows == sum(map(len, shards)) + 1
    assert audit.digest is None


def test_a_broken_shard_does_not_hide_another(tmp_path):
    commit_sample_dataset(tmp_path)
    dataset = write_settings(tmp_path)
    (tmp_path / "shards" / "0000.parquet").unlink()
    path = tmp_path / "shards" / "0002.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    problems = audit_shards(dataset).problems
    assert ["0000.parquet: the manifest" in problems[0], "0002.parquet: sha" in problems[1]] == [
        True,
        True,
    ]


def test_settings_belong_to_the_manifest(tmp_path):
    commit_sample_dataset(tmp_path)
    assert "dataset.json: is missing" in audit_shards(ShardDataset.open(str(tmp_path))).problems[0]
    dataset = write_settings(tmp_path)
    (tmp_path / "dataset.json").write_bytes(b"[]")
    assert "is not the one" in audit_shards(dataset).problems[0]


def test_uncommitted_shards_are_not_damage(tmp_path):
    commit_sample_dataset(tmp_path)
    dataset = write_settings(tmp_path)
    (tmp_path / "shards" / "ffff.parquet").write_bytes(encode_shard([make_pair(99)], CLASSES))
    audit = audit_shards(dataset)
    assert (audit.problems, audit.uncommitted) == ((), ("shards/ffff.parquet",))
