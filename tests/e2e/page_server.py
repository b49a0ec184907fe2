"""The endpoint in this process, on a free port, and a library for it to serve."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraseg.adapters.peft_io import adapter_files
from loraseg.backbones.clip import load_clip
from loraseg.library import BaseModel, Card, Centroid, Library
from loraseg.miniature.captions import LABEL_NAMES
from loraseg.miniature.world import render
from loraseg.segment.base import load_base
from loraseg.serving.api import build_api
from loraseg.serving.build import build_local
from loraseg.serving.config import ServiceConfig
from loraseg.serving.tokens import TokenBook
from loraseg.storage import open_store
from tests.asgi_server import listening
from tests.unit.tiny import random_pairs

DOMAINS = ("fog-light", "night", "snow", "sketch")


def publish_random(folder: Path) -> str:
    """Publish an adapter of random weights for each domain, found where the domain really lies."""
    base, encoder = load_base("miniature"), load_clip("miniature")
    library = Library(open_store(str(folder)))
    for seed, name in enumerate(DOMAINS):
        embeddings = encoder.encode_images(list(render(name, 4, 0, "train")[0]))
        centroid = Centroid.from_embeddings(
            embeddings, encoder_id=encoder.encoder_id, normalised=False
        )
        card = Card(
            name=name,
            role="segmenter",
            base=BaseModel(base.name, base.digest),
            label_space=LABEL_NAMES,
            centroids=(centroid,),
            metrics={"miou": 0.25},
        )
        pairs = random_pairs(base.model, seed, size=0.1)
        library.publish(name, adapter_files(pairs, base_digest=base.digest), card)
    return str(folder)


@contextmanager
def serving(config: ServiceConfig) -> Iterator[str]:
    """Serve with the token file that the config names; yield the page's URL."""
    with build_local(config) as engine:
        assert engine.wait_until_ready(60.0)
        tokens = None if config.tokens is None else TokenBook.open(config.tokens)
        app = build_api(engine, config, tokens=tokens)
        with listening(app) as port:
            yield f"http://127.0.0.1:{port}/"
