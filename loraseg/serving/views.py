"""What clients are told about libraries, adapters and the base."""

import json
import re
import time
from typing import Any

from loraseg.api_types import AdapterInfo
from loraseg.errors import ServiceError
from loraseg.inference.retrieval import RetrievalStage
from loraseg.inference.segmentation import SegmentationStage
from loraseg.inference.watcher import LibraryStatus, LibraryWatcher
from loraseg.library.snapshot import CatalogEntry
from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import CatalogView

__all__ = [
    "base_view",
    "card_view",
    "catalog_view",
    "encoder_view",
    "not_ready_reason",
]

_WEIGHT_FILE = re.compile(r".*(://|\.(safetensors|pt|pth|bin)$)", re.DOTALL)


def catalog_view(live: LibraryWatcher) -> CatalogView:
    """Return a library's state.

    Raises:
        ServiceError: ``not_ready``.
    """
    shelf = live.snapshot()
    status = live.status()
    reasons = {failure.name: failure.reason for failure in live.quarantined(shelf)}
    now = time.time()
    return CatalogView(
        library=status.name,
        generation=shelf.generation,
        loaded_s=max(0.0, now - shelf.loaded_at),
        checked_s=max(0.0, now - (status.checked_at or shelf.loaded_at)),
        problem=status.problem,
        adapters=tuple(_adapter_info(e, reasons.get(e.name)) for e in shelf.entries.values()),
        incompatible=len(shelf.incompatible),
    )


def card_view(live: LibraryWatcher, name: str) -> dict[str, Any]:
    """Return the card of the version in use, without its centroids.

    Raises:
        ServiceError: ``not_ready``, ``no_such_adapter``.
    """
    entry = live.snapshot().entries.get(name)
    if entry is None:
        raise ServiceError("no_such_adapter", f"library {live.name!r}: no adapter {name!r}")
    card: dict[str, Any] = json.loads(entry.card_json)
    card.pop("centroids", None)
    card["base"]["name"] = _without_location(card["base"]["name"])
    return {
        **card,
        "version": entry.version,
        "digest": entry.digest,
        "size_bytes": entry.size_bytes,
    }


def base_view(config: ServiceConfig, stage: SegmentationStage) -> dict[str, Any]:
    """Return what the segmenter knows of what is frozen; see :func:`encoder_view`."""
    predictor = stage.runner().predictor
    base, settings = predictor.base, config.adaptive_settings()
    return {
        "name": _without_location(base.name),
        "digest": base.digest,
        "prompts": list(base.prompts),
        "image_size": base.input_size,
        "window": base.window,
        "inference": predictor.mode,
        "precision": config.precision,
        "settings": {"top_k": settings.k, "temperature": settings.temperature},
        "libraries": list(config.libraries),
    }


def encoder_view(config: ServiceConfig, stage: RetrievalStage) -> dict[str, Any]:
    """Return what the retrieval knows of what is frozen."""
    live = next(iter(stage.libraries.values()))
    return {
        "encoder": {"name": _without_location(config.encoder), "id": live.adapter_filter.encoder_id}
    }


def not_ready_reason(status: LibraryStatus) -> str | None:
    """Say what a library lacks to be served from; None if nothing."""
    if status.snapshot is not None:
        return None
    return f"library {status.name!r}: {status.problem or 'being loaded'}"


def _adapter_info(entry: CatalogEntry, unavailable: str | None) -> AdapterInfo:
    training = entry.card.training
    return AdapterInfo(
        name=entry.name,
        version=entry.version,
        digest=entry.digest,
        size_bytes=entry.size_bytes,
        classes=entry.card.label_space,
        images=None if training is None else training.images,
        unavailable=unavailable,
    )


def _without_location(name: str) -> str:
    """Keep of a path or URI only the file's name: clients need not know where things are."""
    return name.split("#")[0].rpartition("/")[2] if _WEIGHT_FILE.match(name) else name
