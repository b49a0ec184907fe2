"""Small synthetic datasets for tests, written without the code that is tested but for the files."""

import io
import json
from collections import Counter
from dataclasses import fields
from hashlib import sha256

import numpy as np
from PIL import Image

from loraseg.data.shards.manifest import ShardEntry, ShardManifest
from loraseg.data.shards.schema import PairRow, encode_shard
from loraseg.storage import open_store

CLASSES = ("sky", "road", "car")


def png_bytes(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def random_arrays(index, *, height=6, width=8, classes=3):
    """Return image and label of pair ``index``; a quarter of the label is ignored."""
    draw = np.random.default_rng(index)
    wide = classes > 255
    label = draw.integers(classes, size=(height, width)).astype(np.uint16 if wide else np.uint8)
    label[draw.random((height, width)) < 0.25] = 65_535 if wide else 255
    return draw.integers(256, size=(height, width, 3)).astype(np.uint8), label


def pair_id(index):
    return sha256(str(index).encode()).hexdigest()


def make_pair(index, *, classes=3, **changes):
    image, label = random_arrays(index, classes=classes)
    values = {
        "pair_id": pair_id(index),
        "status": "ok",
        "reason": None,
        "mask_name": f"mask {index // 2}.png",
        "mask_id": sha256(f"mask {index // 2}".encode()).hexdigest(),
        "k": index % 2,
        "siblings": 2,
        "image": png_bytes(image),
        "label": png_bytes(label),
        "mask": png_bytes(label),
        "predicted": None,
        "height": 6,
        "width": 8,
        "seed": 2**62 + index,
        "prompt": "sky, road, cär",
        "generator": "ab" * 32,
        "adapters": (("fog", "cd" * 32, 0.75), ("rain", "ef" * 32, 1 / 3)),
        "heads": (("head 0", "01" * 32, 0.1),),
        "kept": 0.75,
        "kept_by_class": (0.5, None, *[1.0] * (classes - 2)),
        "lineage": json.dumps({"pair_id": pair_id(index), "code_revision": "r1"}),
        "code_revision": "r1",
        **changes,
    }
    return PairRow(**values)


def make_bad_mask(name, *, status="bad_mask"):
    blank = {field.name: None for field in fields(PairRow)}
    rest = {"adapters": (), "heads": (), "kept_by_class": ()}
    return PairRow(**{**blank, **rest, "status": status, "reason": "why", "mask_name": name})


def make_dropped(index):
    return make_pair(index, status="dropped", reason="kept 10 %")


def commit_shards(uri, shards, classes=CLASSES):
    """Write a dataset with a list of rows for each shard, and return its manifest."""
    store = open_store(str(uri))
    entries = []
    for number, rows in enumerate(shards):
        data = encode_shard(rows, classes)
        file = f"shards/{number:04x}.parquet"
        store.put(file, data)
        entries.append(
            ShardEntry(
                file=file,
                sha256=sha256(data).hexdigest(),
                size_bytes=len(data),
                rows=len(rows),
                statuses=Counter(row.status for row in rows),
            )
        )
    manifest = ShardManifest(
        generation=1,
        classes=tuple(classes),
        masks=len({row.mask_name for rows in shards for row in rows}),
        shards=tuple(entries),
        plans=("12" * 32,),
        dataset_sha256="34" * 32,
    )
    store.put("manifest.json", manifest.to_bytes())
    return manifest


def commit_sample_dataset(uri):
    """Commit three shards of 7, 0 and 5 ``ok`` pairs among others, 12 in all."""
    commit_shards(
        uri,
        [
            [*map(make_pair, range(7)), make_dropped(100), make_bad_mask("broken.png")],
            [make_bad_mask("twice.png", status="duplicate")],
            [make_dropped(101), *map(make_pair, range(7, 12))],
        ],
    )
