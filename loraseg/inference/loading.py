"""Load base, encoder and library for one run, and the segmenter that uses them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loraseg.backbones.clip import ClipEncoder, load_clip
from loraseg.backbones.device import best_device
from loraseg.errors import AdapterMismatchError
from loraseg.inference.adapter_cache import AdapterCache, AdapterPool
from loraseg.inference.adapter_loader import AdapterLoader
from loraseg.inference.config import AdaptiveSegmenterConfig, SegmenterConfig
from loraseg.inference.model_variants import ModelVariants
from loraseg.inference.segmenter import Segmenter
from loraseg.inference.selection import AdapterMode, AdaptiveSettings
from loraseg.inference.snapshot import (
    AdapterFilter,
    LibrarySnapshot,
    build_snapshot,
    describe_incompatible,
)
from loraseg.library.catalog import Library
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.protocol import OpenVocabularyBase
from loraseg.storage import open_store
from loraseg.tensor_types import Float, ndarray

__all__ = ["LoadedModels", "build_segmenter", "load_models", "load_segmenter"]


@dataclass(frozen=True, slots=True)
class LoadedModels:
    """Base and encoder in memory, with the adapters of one library generation.

    Attributes:
        base: The frozen segmenter.
        encoder: The CLIP of the index.
        snapshot: The usable adapters, and why the others are left out. Weights are loaded when
            they are first used.
    """

    base: OpenVocabularyBase
    encoder: ClipEncoder
    snapshot: LibrarySnapshot

    @property
    def pool(self) -> AdapterPool:
        """The usable adapters."""
        return self.snapshot.pool

    @property
    def generation(self) -> int:
        """Catalog generation of the library; 0 without one."""
        return self.snapshot.generation

    def segmenter(self, settings: AdaptiveSettings, *, sliding: bool = False) -> Segmenter:
        """Return a segmenter; ``sliding`` segments overlapping windows of every image."""
        predictor = Predictor(self.base, mode="sliding" if sliding else "plain")
        return Segmenter(predictor, self.encoder, self.pool, settings)

    def distances(self, images: Sequence[ndarray]) -> Float[ndarray, "images entries"]:
        """Return the Euclidean distance of every image (h, w, 3) to every adapter's domain."""
        if self.pool.retriever is None or not images:
            return np.zeros((len(images), len(self.pool.entries)), dtype=np.float64)
        return self.pool.retriever.distances(self.encoder.encode_images(images))


def load_segmenter(
    library: str | None = None,
    *,
    base: str = "miniature",
    encoder: str = "miniature",
    k: int | None = None,
    temperature: float | None = None,
    mode: AdapterMode = "fused",
) -> Segmenter:
    """Load a segmenter with the adapters of a library; :func:`build_segmenter` has more settings.

    >>> segmenter = load_segmenter(library="runs/quickstart/library")
    >>> [result] = segmenter.segment([image], ["road", "car"])  # image: uint8 (h, w, 3), RGB
    >>> result.label_map, result.explanation.adapters

    Args:
        library: Path or store URI; None segments with the bare base.
        base: ``miniature``, or a weight file.
        encoder: The CLIP that the library's centroids were made with: ``miniature``, or a weight
            file.
        k: Number of fused adapters; None for the encoder's preset.
        temperature: Temperature of the adapter weights; None for the encoder's preset.
        mode: Nearest adapters (``fused``), all adapters with equal weights (``uniform``), or none
            (``base``).

    Raises:
        AdapterMismatchError: The library has adapters of this base, and all are unusable.
        ConfigError: A weight file is missing, or a setting is out of range.
        LorasegError: The library cannot be read.
    """
    return build_segmenter(
        AdaptiveSegmenterConfig(
            library=library,
            base=base,
            encoder=encoder,
            k=k,
            temperature=temperature,
            mode=mode,
        )
    )


def build_segmenter(config: AdaptiveSegmenterConfig) -> Segmenter:
    """Load what a config names; see :func:`load_segmenter`.

    Raises:
        LorasegError: As :func:`load_segmenter`.
    """
    settings = config.adaptive_settings(config.mode)
    models = load_models(config, config.library, config.generation)
    return models.segmenter(settings, sliding=config.sliding)


def load_models(
    config: SegmenterConfig, library: str | None, generation: int | None = None
) -> LoadedModels:
    """Load base and encoder, and read the catalog of a library.

    Adapters that do not fit are left out by the rules of
    :func:`~loraseg.inference.snapshot.build_snapshot`, which an endpoint follows too.

    Args:
        config: Base, encoder, precision and ``clip_attention_lora``.
        library: Path or store URI; None for no adapters.
        generation: Catalog generation; None for the newest.

    Raises:
        AdapterMismatchError: Adapters of this base are published, and all are unusable, for
            instance because their centroids are of another encoder.
        LorasegError: As raised by store, catalog, base or encoder.
    """
    variants, encoder = ModelVariants(config), load_clip(config.encoder)
    encoder.model.to(best_device())
    adapter_filter = AdapterFilter(
        base_digest=variants.base.digest,
        encoder_id=encoder.encoder_id,
        attention=config.clip_attention_lora,
    )
    if library is None:
        snapshot = build_snapshot("", 0, (), adapter_filter)
        pool = replace(snapshot.pool, empty_reason="no library was given")
        return LoadedModels(variants.base, encoder, replace(snapshot, pool=pool))
    opened = Library(open_store(library))
    # The generation is read once, so that all entries are of the same one.
    generation = opened.generation() if generation is None else generation
    published = opened.entries(generation)
    snapshot = build_snapshot(opened.uri, generation, published, adapter_filter)
    if not snapshot.entries and any(adapter_filter.is_for_base(entry) for entry in published):
        reasons = describe_incompatible(snapshot.incompatible)
        raise AdapterMismatchError(f"no adapter of library {opened.uri} can be used: {reasons}")
    base = variants.get(snapshot.attention)
    load = AdapterCache(AdapterLoader({opened.uri: opened}, base))
    return LoadedModels(base, encoder, replace(snapshot, pool=replace(snapshot.pool, load=load)))
