import json

import pytest

from loraseg.data.shards.manifest import ShardEntry, ShardManifest, read_manifest
from loraseg.errors import DatasetError, IntegrityError
from loraseg.storage import open_store
from tests.unit.data.shards.sample_dataset import CLASSES, commit_sample_dataset


def entry(file="shards/ab.parquet", **changes):
    values = {
        "file": file,
        "sha256": "12" * 32,
        "size_bytes": 100,
        "rows": 3,
        "statuses": {"ok": 2, "dropped": 1},
        **changes,
    }
    return ShardEntry(**values)


def manifest(**changes):
    values = {
        "generation": 2,
        "classes": CLASSES,
        "masks": 4,
        "shards": (entry("shards/cd.parquet"), entry()),
        "plans": ("56" * 32, "34" * 32),
        "dataset_sha256": "78" * 32,
        **changes,
    }
    return ShardManifest(**values)


def test_content_of_the_file():
    assert json.loads(manifest().to_bytes()) == {
        "format": 1,
        "generation": 2,
        "classes": list(CLASSES),
        "masks": 4,
        "pairs": 4,
        "statuses": {"ok": 4, "dropped": 2, "bad_mask": 0, "duplicate": 0},
        "shards": [
            {
                "file": file,
                "sha256": "12" * 32,
                "size_bytes": 100,
                "rows": 3,
                "statuses": {"ok": 2, "dropped": 1, "bad_mask": 0, "duplicate": 0},
            }
            for file in ("shards/ab.parquet", "shards/cd.parquet")
        ],
        "plans": ["56" * 32, "34" * 32],
        "dataset_sha256": "78" * 32,
    }


def test_equal_manifests_are_equal_bytes_and_come_back():
    turned = manifest(shards=manifest().shards[::-1])
    assert turned.to_bytes() == manifest().to_bytes()
    assert ShardManifest.from_bytes(manifest().to_bytes(), "x") == manifest()
    empty = manifest(shards=(), plans=())
    assert ShardManifest.from_bytes(empty.to_bytes(), "x") == empty


def test_it_is_read_with_its_etag(tmp_path):
    store = open_store(str(tmp_path))
    assert read_manifest(store) is None
    commit_sample_dataset(tmp_path)
    found, etag = read_manifest(store)
    assert found.pairs == 12
    assert store.put_if_match("manifest.json", found.to_bytes(), etag)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"file": "shards/../manifest.parquet"}, "expected shards/<hex>"),
        ({"file": "/etc/passwd"}, "expected shards/<hex>"),
        ({"file": "shards/AB.parquet"}, "expected shards/<hex>"),
        ({"file": "shards/ab.parquet\n"}, "expected shards/<hex>"),
        ({"sha256": "12"}, "sha256"),
        ({"rows": 4}, "not the sum"),
        ({"size_bytes": -1}, "below 0"),
        ({"statuses": {"ok": 4, "dropped": -1}}, "below 0"),
        ({"statuses": {"ok": 2, "fine": 1}}, "'fine' is not known"),
    ],
)
def test_entries_that_break_the_rules(change, match):
    with pytest.raises(DatasetError, match=match):
        entry(**change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"classes": ()}, "classes: got 0"),
        ({"masks": -1}, "below 0"),
        ({"plans": ("x",)}, "not a sha256"),
        ({"dataset_sha256": ""}, "not a sha256"),
        ({"shards": (entry(), entry())}, "listed twice"),
    ],
)
def test_manifests_that_break_the_rules(change, match):
    with pytest.raises(DatasetError, match=match):
        manifest(**change)


def changed(**changes):
    content = json.loads(manifest().to_bytes())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    return json.dumps(content).encode()


SHARD = json.loads(manifest().to_bytes())["shards"][0]
HOSTILE = {
    "nothing": b"",
    "no json": b"{",
    "not utf-8": b"\xff\xfe",
    "a list": b"[]",
    "deep": b"[" * 10**5,
    "long number": b'{"format": ' + b"9" * 10**5 + b"}",
    "other format": changed(format=2),
    "format true": changed(format="1"),
    "key missing": changed(plans=None),
    "key more": changed(more=1),
    "pairs wrong": changed(pairs=5),
    "statuses wrong": changed(statuses={"ok": 4}),
    "number is text": changed(masks="4"),
    "number is bool": changed(generation=True),
    "number is float": changed(masks=4.0),
    "number is nan": changed(masks=float("nan")),
    "classes no text": changed(classes=[1, 2]),
    "classes an object": changed(classes={"a": 1}),
    "shard no object": changed(shards=[1]),
    "shard leaves": changed(shards=[{**SHARD, "file": "../x.parquet"}]),
    "shard key more": changed(shards=[{**SHARD, "more": 1}]),
    "shard sizes": changed(shards=[{**SHARD, "size_bytes": "1"}]),
    "shard statuses": changed(shards=[{**SHARD, "statuses": [3]}]),
    "shard twice": changed(shards=[SHARD, SHARD]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_manifests_are_refused(what):
    with pytest.raises(IntegrityError, match="where: not a manifest of shards"):
        ShardManifest.from_bytes(HOSTILE[what], "where")
