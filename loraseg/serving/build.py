"""Build the stages of an endpoint from its config, in one process or in each Ray replica."""

from collections.abc import Mapping

from loraseg.backbones.clip import load_clip
from loraseg.backbones.device import best_device
from loraseg.backbones.weights import resolve_weights
from loraseg.inference.adapter_cache import AdapterCache
from loraseg.inference.adapter_loader import AdapterLoader
from loraseg.inference.model_variants import ModelVariants
from loraseg.inference.retrieval import RetrievalStage
from loraseg.inference.segmentation import SegmentationStage
from loraseg.inference.snapshot import AdapterFilter
from loraseg.inference.watcher import LibraryWatcher
from loraseg.library.catalog import Library
from loraseg.serving.config import ServiceConfig
from loraseg.serving.local_engine import LocalEngine
from loraseg.storage import open_store

__all__ = ["build_local_engine", "build_retrieval", "build_segmentation"]

# Requests wait for adapters; a failing catalog should be reported soon.
_ADAPTER_RETRY_TIMEOUT_S = 3.0
_CATALOG_RETRY_TIMEOUT_S = 5.0


def build_retrieval(config: ServiceConfig) -> RetrievalStage:
    """Load the index encoder and follow the libraries, which need not be reachable yet.

    The base's weight file is read for its digest but not loaded.

    Raises:
        LorasegError: The encoder cannot be loaded, or the base or a store's URI is invalid.
    """
    encoder = load_clip(config.encoder)
    device = best_device()
    encoder.model.to(device)
    adapter_filter = AdapterFilter(
        base_digest=resolve_weights(config.base).digest,
        encoder_id=encoder.encoder_id,
        attention=config.clip_attention_lora,
    )
    libraries = _open_libraries(config, _CATALOG_RETRY_TIMEOUT_S)
    watchers = {
        name: LibraryWatcher(
            library, name=name, adapter_filter=adapter_filter, poll_s=config.poll_s
        ).start()
        for name, library in libraries.items()
    }
    return RetrievalStage(encoder, watchers, embed_together=device.type != "cpu")


def build_segmentation(config: ServiceConfig) -> SegmentationStage:
    """Load the base; this contacts no store.

    Raises:
        LorasegError: The base cannot be loaded, or a store's URI is invalid.
    """
    models = ModelVariants(config)
    loader = AdapterLoader(_open_libraries(config, _ADAPTER_RETRY_TIMEOUT_S), models.base)
    cache = AdapterCache(loader, limit_bytes=config.cache_bytes)
    return SegmentationStage(models, cache, mode="sliding" if config.sliding else "plain")


def build_local_engine(config: ServiceConfig) -> LocalEngine:
    """Return an engine in this process; its libraries may still be loading.

    Raises:
        LorasegError: As :func:`build_retrieval` and :func:`build_segmentation`.
    """
    return LocalEngine(config, build_retrieval(config), build_segmentation(config))


def _open_libraries(config: ServiceConfig, retry_timeout_s: float) -> Mapping[str, Library]:
    return {
        name: Library(open_store(uri).with_retry_timeout(retry_timeout_s))
        for name, uri in config.libraries.items()
    }
