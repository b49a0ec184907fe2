"""Real images in a folder and synthetic pairs in shards."""

import io
import json
from dataclasses import fields
from hashlib import sha256

import numpy as np
from PIL import Image

from loraseg.data.shards.manifest import ShardEntry, ShardManifest
from loraseg.data.shards.schema import PairRow, encode_shard
from loraseg.storage import open_store

CLASSES = ("road", "car", "sky")
BLANK = {field.name: None for field in fields(PairRow)} | dict.fromkeys(
    ("adapters", "heads", "kept_by_class"), ()
)


def picture(seed, size=(20, 24)):
    """A coloured gradient with noise, different for every seed."""
    rng = np.random.default_rng(seed)
    corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    smooth = np.asarray(corners.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    return np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write_real(folder, images, split="train"):
    for number, image in enumerate(images):
        path = folder / "images" / split / f"real{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    (folder / "classes.json").write_text(json.dumps(list(CLASSES)))
    return folder


def pair(number, image, *, mask, prompt="road sky", **other):
    values = {
        "pair_id": f"{number:04x}",
        "status": "ok",
        "mask_name": f"mask {mask}",
        "mask_id": f"{mask:064x}",
        "prompt": prompt,
        "image": image if isinstance(image, bytes) else png(image),
        "label": png(np.zeros((20, 24), np.uint8)),
        "height": 20,
        "width": 24,
    }
    return PairRow(**{**BLANK, **values, **other})


def write_shards(folder, *shards):
    """Commit lists of rows as the shards of a dataset, and return its URI."""
    store = open_store(str(folder))
    entries = []
    for rows in shards:
        data = encode_shard(rows, CLASSES)
        digest = sha256(data).hexdigest()
        store.put(f"shards/{digest}.parquet", data)
        statuses = [row.status for row in rows]
        entries.append(
            ShardEntry(
                file=f"shards/{digest}.parquet",
                sha256=digest,
                size_bytes=len(data),
                rows=len(rows),
                statuses={status: statuses.count(status) for status in set(statuses)},
            )
        )
    manifest = ShardManifest(
        generation=1,
        classes=CLASSES,
        masks=len({row.mask_id for rows in shards for row in rows}),
        shards=tuple(entries),
        plans=(),
        dataset_sha256="ab" * 32,
    )
    store.put("manifest.json", manifest.to_bytes())
    return str(folder)
