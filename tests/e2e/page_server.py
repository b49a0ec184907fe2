"""An endpoint in this process on a free port, and its library."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraseg.adapters.peft_io import to_peft_files
from loraseg.backbones.clip import load_clip
from loraseg.library import AdapterCard, BaseModelInfo, Centroid, Library
from loraseg.miniature.world.captions import LABEL_NAMES
from loraseg.miniature.world.render import render
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.serving.build import build_local_engine
from loraseg.serving.config import ServiceConfig
from loraseg.serving.http_api.app import build_api
from loraseg.serving.tokens import TokenStore
from loraseg.storage import open_store
from tests.asgi_server import serve_on_free_port
from tests.unit.tiny import random_pairs

DOMAINS = ("fog-light", "night", "snow", "sketch")


def publish_random(folder: Path) -> str:
    """Publish an adapter with random weights and the real centroid for each domain."""
    base, encoder = load_base("miniature"), load_clip("miniature")
    library = Library(open_store(str(folder)))
    for seed, name in enumerate(DOMAINS):
        embeddings = encoder.encode_images(list(render(name, 4, 0, "train")[0]))
        centroid = Centroid.from_embeddings(
            embeddings, encoder_id=encoder.encoder_id, normalised=False
        )
        card = AdapterCard(
            name=name,
            role="segmenter",
            base=BaseModelInfo(base.name, base.digest),
            label_space=LABEL_NAMES,
            centroids=(centroid,),
            metrics={"miou": 0.25},
        )
        pairs = random_pairs(base.model, seed, size=0.1)
        library.publish(name, to_peft_files(pairs, base_digest=base.digest), card)
    return str(folder)


@contextmanager
def serving(config: ServiceConfig) -> Iterator[str]:
    """Serve the API, with the config's token file if any; yield the page's URL."""
    with build_local_engine(config) as engine:
        assert engine.wait_until_ready(60.0)
        tokens = None if config.tokens is None else TokenStore.open(config.tokens)
        app = build_api(engine, config, tokens=tokens)
        with serve_on_free_port(app) as port:
            yield f"http://127.0.0.1:{port}/"
