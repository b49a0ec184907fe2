"""Bring base, encoder and library together: what it takes to segment adaptively."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from loraseg.adapters.packed import PackedAdapter
from loraseg.backbones.clip import ClipEncoder, load_clip
from loraseg.backbones.device import best_device
from loraseg.errors import AdapterMismatchError, AdapterNotFoundError
from loraseg.inference.adapter_cache import AdapterCache, AdapterPool
from loraseg.inference.adapter_loader import AdapterLoader
from loraseg.inference.adapter_ref import AdapterRef
from loraseg.library.catalog import Library
from loraseg.library.retrieve import AdapterRetriever
from loraseg.library.snapshot import CatalogEntry
from loraseg.segment.open_vocabulary.base import SegmentationBase, load_base
from loraseg.storage import open_store
from loraseg.tensor_types import Float, ndarray

__all__ = [
    "AttentionLoraSetting",
    "LoadedSegmenter",
    "Precision",
    "SegmenterConfig",
    "load_segmenter",
    "to_device",
]

AttentionLoraSetting = Literal["active", "inert", "as_trained"]
Precision = Literal["fp32", "bf16"]

_DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterConfig:
    """What to bring together.

    Attributes:
        library: Store URI; None for no adapters at all.
        base: As for :func:`loraseg.segment.open_vocabulary.base.load_base`.
        encoder: As for :func:`loraseg.backbones.clip.load_clip`.
        clip_attention_lora: Whether adapters of the CLIP attention act (methods B.1);
            ``as_trained`` follows the adapters' recipes.
        generation: Of the library; None for the newest.
        precision: What the segmenter computes in; scores and label maps keep their types.
    """

    library: str | None
    base: str = "miniature"
    encoder: str = "miniature"
    clip_attention_lora: AttentionLoraSetting = "as_trained"
    generation: int | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True, slots=True)
class LoadedSegmenter:
    """Base and encoder in memory, the fitting adapters within reach."""

    base: SegmentationBase
    encoder: ClipEncoder
    pool: AdapterPool
    generation: int

    def distances(self, images: Sequence[ndarray]) -> Float[ndarray, "images entries"]:
        """Return the Euclidean distance of every image to every entry's domain."""
        if self.pool.retriever is None or not images:
            return np.zeros((len(images), len(self.pool.entries)), dtype=np.float64)
        return self.pool.retriever.distances(self.encoder.encode_images(images))


def load_segmenter(config: SegmenterConfig) -> LoadedSegmenter:
    """Load base and encoder, read the catalog; adapters are read when they are needed.

    Raises:
        AdapterMismatchError: Fitting adapters have no centroid of this encoder, or
            ``as_trained`` meets both kinds.
        LorasegError: As raised by store, catalog, base or encoder.
    """
    base, encoder = load_base(config.base), load_clip(config.encoder)
    encoder.model.to(best_device())
    if config.library is None:
        pool = AdapterPool((), _raise_no_library, None, "no library was named")
        return LoadedSegmenter(to_device(base, config.precision), encoder, pool, 0)
    library = Library(open_store(config.library))
    # Read once: what is published while we load must not give other entries.
    generation = library.generation() if config.generation is None else config.generation
    published = library.entries(generation)
    fitting = [entry for entry in published if _fits(entry, base)]
    kind = config.clip_attention_lora
    if kind == "as_trained":
        kind = _trained_attention_lora(fitting)
    if base.model.config.clip_attention_lora != kind:
        base = load_base(config.base, clip_attention_lora=kind)
    base = to_device(base, config.precision)
    pool = AdapterPool(
        fitting,
        AdapterCache(_make_adapter_loader(library, base)),
        AdapterRetriever(fitting, encoder_id=encoder.encoder_id) if fitting else None,
        _empty_reason(library.uri, published, base),
    )
    return LoadedSegmenter(base, encoder, pool, generation)


def to_device(base: SegmentationBase, precision: Precision) -> SegmentationBase:
    """Put a base on the device of this process, in the type that it is to compute in."""
    base.model.to(best_device(), _DTYPES[precision])
    return base


def _make_adapter_loader(
    library: Library, base: SegmentationBase
) -> Callable[[CatalogEntry], PackedAdapter]:
    source = AdapterLoader({library.uri: library}, base)
    return lambda entry: source(AdapterRef.from_entry(library.uri, entry))


def _empty_reason(uri: str, published: Sequence[CatalogEntry], base: SegmentationBase) -> str:
    """Say why no adapter fits, if none does."""
    if not published:
        return f"the library {uri} is empty"
    others = sorted({f"{e.card.base.name} ({e.card.base.digest[:12]})" for e in published})
    return (
        f"no segmentation adapter of {uri} fits base {base.name} ({base.digest[:12]}); "
        f"they are for {', '.join(others)}"
    )


def _raise_no_library(entry: Any) -> PackedAdapter:
    raise AdapterNotFoundError(f"adapter {entry.name!r}: no library was named")


def _fits(entry: CatalogEntry, base: SegmentationBase) -> bool:
    return entry.card.role == "segmenter" and entry.card.base.digest == base.digest


def _trained_attention_lora(entries: Sequence[CatalogEntry]) -> Literal["active", "inert"]:
    """Return how the adapters were trained.

    Published SemLA adapters say nothing; their pairs of the attention are zero, so either does.
    """
    kinds = {entry.card.recipe.get("clip_attention_lora", "active") for entry in entries}
    if len(kinds) > 1:
        raise AdapterMismatchError(
            "the library mixes adapters trained with the CLIP attention active and inert; "
            "set clip_attention_lora to one of them"
        )
    return "inert" if kinds == {"inert"} else "active"
