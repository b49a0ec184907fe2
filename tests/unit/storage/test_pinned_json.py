"""Bytes and digests that stored data depends on, as of version 0.1.0."""

import json

from loraseg.adapters.peft_config import render_config
from loraseg.adapters.peft_io import files_digest
from loraseg.adapters.targets.layer_report import LayerReport, LayerScore
from loraseg.data.shards.manifest import ShardEntry, ShardManifest
from loraseg.library.records import CatalogHead
from loraseg.synth.lineage import generator_digest, pair_id


def test_layer_report():
    scores = (
        LayerScore(name="a.b", score=0.5, history=(0.25, 0.5), numel=4),
        LayerScore(name="a.c", score=1.5, numel=4),
    )
    report = LayerReport(
        method="gradient",
        base_name="tiny",
        base_digest="b" * 64,
        scores=scores,
        samples={"images": 2},
        settings={"s": "ü", "l": [1, 2.5]},
    )
    text = (
        '{"base_digest":"%s","base_name":"tiny","format":"loraseg layer report 1",'
        '"method":"gradient","samples":{"images":2},"scores":[{"block":null,"cross":null,'
        '"factor":null,"history":[],"name":"a.c","numel":4,"part":null,"score":1.5},'
        '{"block":null,"cross":null,"factor":null,"history":[0.25,0.5],"name":"a.b","numel":4,'
        '"part":null,"score":0.5}],"settings":{"l":[1,2.5],"s":"\\u00fc"}}\n'
    )
    assert report.to_bytes().decode() == text % ("b" * 64)


def test_shard_manifest():
    entry = ShardEntry(
        file="shards/0a.parquet", sha256="a" * 64, size_bytes=3, rows=1, statuses={"ok": 1}
    )
    manifest = ShardManifest(
        generation=1,
        classes=("Straße",),
        masks=1,
        shards=(entry,),
        plans=("f" * 64,),
        dataset_sha256="b" * 64,
    )
    statuses = [' "bad_mask": 0', ' "dropped": 0', ' "duplicate": 0', ' "ok": 1']
    lines = [
        "{",
        ' "classes": [',
        '  "Straße"',
        " ],",
        f' "dataset_sha256": "{"b" * 64}",',
        ' "format": 1,',
        ' "generation": 1,',
        ' "masks": 1,',
        ' "pairs": 1,',
        ' "plans": [',
        f'  "{"f" * 64}"',
        " ],",
        ' "shards": [',
        "  {",
        '   "file": "shards/0a.parquet",',
        '   "rows": 1,',
        f'   "sha256": "{"a" * 64}",',
        '   "size_bytes": 3,',
        '   "statuses": {',
        ",\n".join(f"   {status}" for status in statuses),
        "   }",
        "  }",
        " ],",
        ' "statuses": {',
        ",\n".join(f" {status}" for status in statuses),
        " }",
        "}",
        "",
    ]
    assert manifest.to_bytes().decode() == "\n".join(lines)


def test_catalog_head():
    text = '{"generation":3,"schema":1,"sha256":"%s","snapshot":"catalog/00000003.parquet"}'
    assert CatalogHead(3, "e" * 64).to_bytes().decode() == text % ("e" * 64)


def test_adapter_files():
    files = {"adapter_config.json": b"c", "adapter_model.safetensors": b"w", "card.json": b"x"}
    digest = "9b9d5df3c3d65991c8ed670936835f38d0438c2f88119e25ae86c20a5377b60d"
    assert files_digest(files) == digest
    config = render_config({"a": 2, "b": 2}, {"a": 4.0, "b": 0.5})
    assert config.decode() == json.dumps(json.loads(config), indent=2, sort_keys=True) + "\n"


def test_lineage():
    digest = "3665df3e5a98360bb5582be32769bd68d541f63300a3c1664e28a5512cb7a8d0"
    assert pair_id("m", 2, "g", 5, (0.1,)) == digest
    digest = "196cec318ea09e5eb253ed00c2fe8d8d6c3198f2b3754d2a3240998c04ec6d83"
    assert generator_digest({"b": 0.1, "a": "ü"}) == digest
