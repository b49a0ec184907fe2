"""Tiny synthetic datasets and pairs that can be learned in a few steps."""

import hashlib

import numpy as np

from loraseg.data.drawing import encode_png
from loraseg.data.shards.manifest import MANIFEST_KEY, ShardEntry, ShardManifest
from loraseg.data.shards.pictures import encode_label
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import PairRow, encode_shard
from loraseg.storage import open_store
from tests.tiny_training import LABELS, write_domain

TINY_RECIPE = {
    "network": {"width": 8},
    "steps": 6,
    "batch_size": 4,
    "crop": 32,
    "eval_every": 2,
    "precision": "fp32",
}


def write_datasets(root):
    """Write a real and a synthetic dataset below a folder; return the folder."""
    write_domain(root / "real", "fog")
    images, labels = coloured_pairs(6, 0, side=32)
    commit_pairs(root / "synthetic", zip(images, labels, strict=True), LABELS.names)
    return root


def numbered_pairs(start, stop, side=8):
    """Pairs whose number fills the image, labelled number % 3, with an ignored first row."""
    for number in range(start, stop):
        label = np.full((side, side), number % 3, np.uint8)
        label[0] = 255
        yield np.full((side, side, 3), number, np.uint8), label


def commit_pairs(folder, pairs, classes, *, rows_a_shard=64):
    """Write pairs as a committed synthetic dataset and open it."""
    rows = [_row(index, image, label, classes) for index, (image, label) in enumerate(pairs)]
    store = open_store(str(folder))
    entries = []
    for start in range(0, len(rows), rows_a_shard):
        part = rows[start : start + rows_a_shard]
        data = encode_shard(part, classes)
        digest = hashlib.sha256(data).hexdigest()
        file = f"shards/{digest[:16]}.parquet"
        store.put(file, data)
        entries.append(
            ShardEntry(
                file=file,
                sha256=digest,
                size_bytes=len(data),
                rows=len(part),
                statuses={"ok": len(part)},
            )
        )
    manifest = ShardManifest(
        generation=1,
        classes=tuple(classes),
        masks=len(rows),
        shards=tuple(sorted(entries, key=lambda entry: entry.file)),
        plans=(),
        dataset_sha256="0" * 64,
    )
    store.put(MANIFEST_KEY, manifest.to_bytes())
    return ShardDataset.open(str(folder))


def _row(index, image, label, classes):
    blank = dict.fromkeys(
        ("reason", "mask", "predicted", "prompt", "generator", "kept", "lineage", "code_revision")
    )
    return PairRow(
        **blank,
        pair_id=hashlib.sha256(f"{index}".encode()).hexdigest(),
        status="ok",
        mask_name=f"mask {index}",
        mask_id=hashlib.sha256(label.tobytes()).hexdigest(),
        k=0,
        siblings=1,
        image=encode_png(image),
        label=encode_label(label, classes),
        height=label.shape[0],
        width=label.shape[1],
        seed=0,
        adapters=(),
        heads=(),
        kept_by_class=(),
    )


def coloured_pairs(count, seed, side=16):
    """Images whose colours encode the class of each pixel: (n, s, s, 3) and (n, s, s)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 3, (count, side // 4, side // 4), dtype=np.uint8)
    labels = small.repeat(4, 1).repeat(4, 2)
    noise = rng.integers(0, 40, (*labels.shape, 3), dtype=np.uint8)
    return (np.eye(3, dtype=np.uint8)[labels] * 180 + noise).astype(np.uint8), labels
