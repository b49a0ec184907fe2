"""The stages of one endpoint, made from its config: for one process, or for each of Ray's."""

from collections.abc import Mapping

from loraseg.backbones.clip import load_clip
from loraseg.backbones.device import best_device
from loraseg.backbones.source import resolve
from loraseg.engine.live import LiveLibrary
from loraseg.engine.models import Models
from loraseg.engine.retrieval import RetrievalStage
from loraseg.engine.segmenting import SegmentStage
from loraseg.engine.shelf import Taste
from loraseg.engine.source import AdapterSource
from loraseg.library.catalog import Library
from loraseg.segment.pool import AdapterCache
from loraseg.serving.config import ServiceConfig
from loraseg.serving.local import LocalEngine
from loraseg.storage import open_store

__all__ = ["build_local", "build_retrieval", "build_segment"]

# Somebody waits for an adapter; for a catalog nobody does, but problems should be seen soon.
_ADAPTER_PATIENCE_S = 3.0
_CATALOG_PATIENCE_S = 5.0


def build_retrieval(config: ServiceConfig) -> RetrievalStage:
    """Load the index encoder and begin to follow the libraries, which need not be there yet.

    The base's weight file is read for its digest, but not loaded.

    Raises:
        LorasegError: The encoder cannot be loaded, or the base or a store's URI is wrong.
    """
    encoder = load_clip(config.encoder)
    device = best_device()
    encoder.model.to(device)
    taste = Taste(
        base_digest=resolve(config.base).digest,
        encoder_id=encoder.encoder_id,
        attention=config.clip_attention_lora,
    )
    libraries = _libraries(config, _CATALOG_PATIENCE_S)
    followed = {
        name: LiveLibrary(library, name=name, taste=taste, poll_s=config.poll_s).start()
        for name, library in libraries.items()
    }
    return RetrievalStage(encoder, followed, embed_together=device.type != "cpu")


def build_segment(config: ServiceConfig) -> SegmentStage:
    """Load the base; no store is contacted.

    Raises:
        LorasegError: The base cannot be loaded, or a store's URI is wrong.
    """
    models = Models(
        config.base,
        attention=config.clip_attention_lora,
        precision=config.precision,
        mode="sliding" if config.sliding else "plain",
    )
    source = AdapterSource(_libraries(config, _ADAPTER_PATIENCE_S), models.base)
    cache = AdapterCache(source, limit_bytes=config.cache_bytes)
    return SegmentStage(lambda attention: models.runner(attention, cache), cache)


def build_local(config: ServiceConfig) -> LocalEngine:
    """Return an engine in this process; libraries may still be loading.

    Raises:
        LorasegError: As :func:`build_retrieval` and :func:`build_segment`.
    """
    return LocalEngine(config, build_retrieval(config), build_segment(config))


def _libraries(config: ServiceConfig, patience_s: float) -> Mapping[str, Library]:
    return {
        name: Library(open_store(uri).with_patience(patience_s))
        for name, uri in config.libraries.items()
    }
