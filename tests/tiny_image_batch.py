"""A tiny library and a folder of valid and invalid images for jobs.segment_images."""

import io

import numpy as np
from PIL import Image

from loraseg.backbones.clip import load_clip
from loraseg.batch.segment_images import SegmentImagesConfig
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.storage import open_store
from tests.unit.tiny import CLASSES, DOMAINS, domain_images, publish, write_models

BAD = {
    "cut.jpg": "bad_image",
    "empty.png": "bad_image",
    "huge.png": "bad_image",
    "notes.txt": "bad_image",
}


def png(image, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, format=kind)
    return buffer.getvalue()


def good_images(names=tuple(DOMAINS), count=3):
    """Return PNG bytes by key."""
    return {
        f"{name}/{number} é.png": png(image)
        for name in names
        for number, image in enumerate(domain_images(name, count))
    }


def bad_images():
    jpeg = png(domain_images("day", 1)[0], "JPEG")
    # A header that claims 30,000 x 30,000 pixels.
    huge = bytearray(png(np.zeros((1, 1), dtype=np.uint8)))
    huge[16:24] = (30_000).to_bytes(4, "big") * 2
    return {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "empty.png": b"",
        "huge.png": bytes(huge),
        "notes.txt": b"not an image",
    }


def put_all(uri, objects):
    store = open_store(uri)
    for key, data in objects.items():
        store.put(key, data)
    return store


def write_inputs(folder, images, output, **changes):
    """Write models and library below a folder and return a config for them."""
    folder.mkdir(parents=True, exist_ok=True)
    base, clip = write_models(folder)
    publish(folder / "library", load_base(base), load_clip(clip))
    values = {
        "images": str(images),
        "output": str(output),
        "classes": CLASSES,
        "library": str(folder / "library"),
        "base": base,
        "encoder": clip,
        "k": 2,
        "temperature": 0.3,
        "images_per_file": 4,
    }
    return SegmentImagesConfig(**{**values, **changes})


def read_all(uri):
    """Return all objects of a store by key."""
    store = open_store(uri)
    return {key: store.get(key) for key in store.list()}
