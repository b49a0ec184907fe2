"""Bring base, encoder and library together: what it takes to segment adaptively."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from loraseg.adapters.packed import PackedAdapter
from loraseg.backbones.clip import ClipEncoder, load_clip
from loraseg.backbones.device import best_device
from loraseg.engine.adapter_ref import AdapterRef
from loraseg.engine.source import AdapterSource
from loraseg.errors import AdapterMismatchError, AdapterNotFoundError
from loraseg.library.catalog import Library
from loraseg.library.retrieve import Retriever
from loraseg.library.snapshot import Entry
from loraseg.segment.base import SegmentationBase, load_base
from loraseg.segment.pool import AdapterCache, AdapterPool
from loraseg.storage import open_store
from loraseg.tensor_types import Float, ndarray

__all__ = ["AttentionLora", "Equipment", "Precision", "Wanted", "equip", "placed"]

AttentionLora = Literal["active", "inert", "as_trained"]
Precision = Literal["fp32", "bf16"]

_DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What to bring together.

    Attributes:
        library: Store URI; None for no adapters at all.
        base: As for :func:`loraseg.segment.base.load_base`.
        encoder: As for :func:`loraseg.backbones.clip.load_clip`.
        clip_attention_lora: Whether adapters of the CLIP attention act (methods B.1);
            ``as_trained`` follows the adapters' recipes.
        generation: Of the library; None for the newest.
        precision: What the segmenter computes in; scores and label maps keep their types.
    """

    library: str | None
    base: str = "miniature"
    encoder: str = "miniature"
    clip_attention_lora: AttentionLora = "as_trained"
    generation: int | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True, slots=True)
class Equipment:
    """Base and encoder in memory, the fitting adapters within reach."""

    base: SegmentationBase
    encoder: ClipEncoder
    pool: AdapterPool
    generation: int

    def measure(self, images: Sequence[ndarray]) -> Float[ndarray, "images entries"]:
        """Return the Euclidean distance of every image to every entry's domain."""
        if self.pool.retriever is None or not images:
            return np.zeros((len(images), len(self.pool.entries)), dtype=np.float64)
        return self.pool.retriever.distances(self.encoder.encode_images(images))


def equip(wanted: Wanted) -> Equipment:
    """Load base and encoder, read the catalog; adapters are read when they are needed.

    Raises:
        AdapterMismatchError: Fitting adapters have no centroid of this encoder, or
            ``as_trained`` meets both kinds.
        LorasegError: As raised by store, catalog, base or encoder.
    """
    base, encoder = load_base(wanted.base), load_clip(wanted.encoder)
    encoder.model.to(best_device())
    if wanted.library is None:
        pool = AdapterPool((), _no_adapter, None, "no library was named")
        return Equipment(placed(base, wanted.precision), encoder, pool, 0)
    library = Library(open_store(wanted.library))
    # Read once: what is published while we load must not give other entries.
    generation = library.generation() if wanted.generation is None else wanted.generation
    published = library.entries(generation)
    fitting = [entry for entry in published if _fits(entry, base)]
    kind = wanted.clip_attention_lora
    if kind == "as_trained":
        kind = _trained_kind(fitting)
    if base.model.config.clip_attention_lora != kind:
        base = load_base(wanted.base, clip_attention_lora=kind)
    base = placed(base, wanted.precision)
    pool = AdapterPool(
        fitting,
        AdapterCache(_loader(library, base)),
        Retriever(fitting, encoder_id=encoder.encoder_id) if fitting else None,
        _vacancy(library.uri, published, base),
    )
    return Equipment(base, encoder, pool, generation)


def placed(base: SegmentationBase, precision: Precision) -> SegmentationBase:
    """Put a base on the device of this process, in the type that it is to compute in."""
    base.model.to(best_device(), _DTYPES[precision])
    return base


def _loader(library: Library, base: SegmentationBase) -> Callable[[Entry], PackedAdapter]:
    source = AdapterSource({library.uri: library}, base)
    return lambda entry: source(AdapterRef.of(library.uri, entry))


def _vacancy(uri: str, published: Sequence[Entry], base: SegmentationBase) -> str:
    """Say why no adapter fits, if none does."""
    if not published:
        return f"the library {uri} is empty"
    others = sorted({f"{e.card.base.name} ({e.card.base.digest[:12]})" for e in published})
    return (
        f"no segmentation adapter of {uri} fits base {base.name} ({base.digest[:12]}); "
        f"they are for {', '.join(others)}"
    )


def _no_adapter(entry: Any) -> PackedAdapter:
    raise AdapterNotFoundError(f"adapter {entry.name!r}: no library was named")


def _fits(entry: Entry, base: SegmentationBase) -> bool:
    return entry.card.role == "segmenter" and entry.card.base.digest == base.digest


def _trained_kind(entries: Sequence[Entry]) -> Literal["active", "inert"]:
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
