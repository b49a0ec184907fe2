"""A reply of the API; test_client.py compares its keys with those of a real one."""

import base64
import io

import numpy as np
from PIL import Image

CLASSES = ("road", "car", "sky")
SHAPE = (4, 6)
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(*SHAPE, 3)
LABELS = np.arange(24, dtype=np.uint8).reshape(SHAPE) % 3


def png64(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def sample_response(**changes):
    adapter = {"name": "rain", "version": 3, "digest": "ab" * 32}
    return {
        "request_id": "r1",
        "image": {"width": SHAPE[1], "height": SHAPE[0]},
        "classes": list(CLASSES),
        "class_map": dict(zip("012", CLASSES, strict=True)),
        "palette": [[128, 64, 128], [0, 0, 142], [70, 130, 180]],
        "segmentation_mask": png64(LABELS),
        "shares": dict.fromkeys(CLASSES, 1 / 3),
        "mode": "fused",
        "library": "main",
        "generation": 7,
        "base": "cd" * 32,
        "mix": "ef" * 32,
        "adapters": [{**adapter, "weight": 1.0, "distance": 0.25}],
        "fallback": None,
        "skipped": [{**adapter, "name": "snow", "reason": "a stored file is missing"}],
        "tiles": 1,
        "batch": 1,
        "timing_ms": {"embed": 1.0, "segment": 2.5, "total": 4.0},
        **changes,
    }
