"""Descriptions of libraries, adapters, base and encoder for clients."""

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


def catalog_view(watcher: LibraryWatcher) -> CatalogView:
    """Return a library's state.

    Raises:
        ServiceError: ``not_ready``.
    """
    snapshot = watcher.snapshot()
    status = watcher.status()
    reasons = {failure.name: failure.reason for failure in watcher.quarantined(snapshot)}
    now = time.time()
    return CatalogView(
        library=status.name,
        generation=snapshot.generation,
        loaded_s=max(0.0, now - snapshot.loaded_at),
        checked_s=max(0.0, now - (status.checked_at or snapshot.loaded_at)),
        problem=status.problem,
        adapters=tuple(_adapter_info(e, reasons.get(e.name)) for e in snapshot.entries.values()),
        incompatible=len(snapshot.incompatible),
    )


def card_view(watcher: LibraryWatcher, name: str) -> dict[str, Any]:
    """Return the card of the version in use, without its centroids.

    Raises:
        ServiceError: ``not_ready``, ``no_such_adapter``.
    """
    entry = watcher.snapshot().entries.get(name)
    if entry is None:
        raise ServiceError("no_such_adapter", f"library {watcher.name!r}: no adapter {name!r}")
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
    """Return the description of the base; :func:`encoder_view` has the encoder's."""
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
    """Return the description of the encoder."""
    encoder_id = next(iter(stage.libraries.values())).adapter_filter.encoder_id
    return {"encoder": {"name": _without_location(config.encoder), "id": encoder_id}}


def not_ready_reason(status: LibraryStatus) -> str | None:
    """Return why a library cannot be used yet; None if it can."""
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
    """Return only the file name of a path or URI, since clients must not see locations."""
    return name.split("#")[0].rpartition("/")[2] if _WEIGHT_FILE.match(name) else name
