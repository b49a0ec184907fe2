"""Small adapters to publish; their weights are not looked into by the library."""

import hashlib

import numpy as np

from loraseg.library import AdapterCard, BaseModelInfo, Centroid, TrainingSet

BASE = BaseModelInfo("miniature", "b" * 64)


def make_centroid(vector=(0.0, 1.0), *, encoder_id="clip", normalised=False):
    return Centroid(encoder_id, normalised, np.array(vector, dtype=np.float64), 3, 0.25)


def make_card(name, *, centroids=None, **fields):
    return AdapterCard(
        name=name,
        role="segmenter",
        base=BASE,
        label_space=("road", "car"),
        centroids=(make_centroid(),) if centroids is None else tuple(centroids),
        recipe={"rank": 8, "learning_rate": 1e-4},
        training=TrainingSet(hashlib.sha256(name.encode()).hexdigest(), 12),
        metrics={"miou": 0.5},
        **fields,
    )


def make_files(content="weights"):
    return {
        "adapter_config.json": b'{"r":8}',
        "adapter_model.safetensors": content.encode() * 100,
    }
