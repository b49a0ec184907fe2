"""What the endpoint reports of itself, on the metrics port of every Ray node (Prometheus).

Ray puts ``ray_`` before each name, and adds the deployment and the replica as labels.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ray.serve import metrics

from loraseg.engine.lane import Lane
from loraseg.engine.live import LiveLibrary
from loraseg.segment.pool import AdapterCache
from loraseg.serving.guard import Visit
from loraseg.serving.orders import Order, Outcome

__all__ = ["CacheMeter", "CatalogMeter", "OrderMeter", "RequestMeter"]

logger = logging.getLogger(__name__)

# Ray's annotations allow for one label only.
Counter: Any = metrics.Counter
Gauge: Any = metrics.Gauge
Histogram: Any = metrics.Histogram

_EVERY_S = 5.0
_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class RequestMeter:
    """HTTP requests of a gateway."""

    def __init__(self) -> None:
        self._requests = Counter(
            "loraseg_requests", "HTTP requests.", ("method", "path", "status", "code")
        )
        self._seconds = Histogram(
            "loraseg_request_seconds",
            "From a request's arrival to the last byte of its answer.",
            _SECONDS,
            ("path",),
        )

    def count(self, visit: Visit) -> None:
        """Count a request that is over."""
        status, code = str(visit.status), visit.code or ""
        tags = {"method": visit.method, "path": visit.route, "status": status, "code": code}
        self._requests.inc(tags=tags)
        self._seconds.observe(max(visit.duration_s, 1e-6), tags={"path": visit.route})


class OrderMeter:
    """Images that a gateway had segmented."""

    def __init__(self) -> None:
        self._images = Counter(
            "loraseg_images",
            "Segmented images; fallback=yes where the bare base had to stand in for adapters.",
            ("library", "mode", "fallback"),
        )
        self._seconds = Histogram(
            "loraseg_stage_seconds",
            "Time of an image in each stage; queue is all waiting and hops between them.",
            _SECONDS,
            ("stage",),
        )
        self._batch = Histogram(
            "loraseg_batch_images", "Images that went through the model with this one.", _SIZES
        )
        self._tiles = Counter("loraseg_tiles", "Tiles of large images.")

    def count(self, order: Order, outcome: Outcome) -> None:
        """Count an image."""
        why = outcome.result.explanation
        fallback = "no" if why.fallback is None else "yes"
        self._images.inc(tags={"library": order.library, "mode": why.mode, "fallback": fallback})
        for stage, spent_ms in outcome.timing_ms.items():
            self._seconds.observe(max(spent_ms / 1000, 1e-6), tags={"stage": stage})
        self._batch.observe(outcome.batch)
        if outcome.result.tiles > 1:
            self._tiles.inc(outcome.result.tiles)


class CacheMeter:
    """Adapters in a segmenter's memory, and images before its model."""

    def __init__(self, cache: AdapterCache, lane: Lane) -> None:
        self._cache, self._lane = cache, lane
        self._resident = Gauge("loraseg_adapters_resident", "Adapters in memory.")
        self._bytes = Gauge("loraseg_adapter_bytes", "Memory that adapters take.")
        self._queue = Gauge("loraseg_segmenter_images", "Images waiting for the model, or in it.")
        self._totals = {
            name: Counter(f"loraseg_adapter_{name}", help_text)
            for name, help_text in (
                ("hits", "Adapters asked for that were in memory."),
                ("misses", "Adapters that had to be loaded."),
                ("evictions", "Adapters that had to make room."),
                ("failures", "Adapters that could not be loaded."),
                ("load_seconds", "Time spent loading adapters."),
            )
        }
        self._last = dict.fromkeys(self._totals, 0.0)
        _repeat("cache-meter", self._report)

    def _report(self) -> None:
        stats = asdict(self._cache.stats())
        self._resident.set(stats["resident"])
        self._bytes.set(stats["size_bytes"])
        self._queue.set(self._lane.under_way)
        for name, counter in self._totals.items():
            grown = stats[name] - self._last[name]
            self._last[name] = stats[name]
            if grown > 0:
                counter.inc(grown)


class CatalogMeter:
    """The libraries that a retrieval replica follows."""

    def __init__(self, libraries: Mapping[str, LiveLibrary]) -> None:
        self._libraries = libraries
        label = ("library",)
        self._generation = Gauge("loraseg_catalog_generation", "Generation in use.", label)
        self._age = Gauge(
            "loraseg_catalog_age_seconds",
            "Since the store last confirmed that the generation in use is the newest.",
            label,
        )
        self._adapters = Gauge("loraseg_catalog_adapters", "Adapters that fit the base.", label)
        self._aside = Gauge(
            "loraseg_adapters_out_of_service", "Adapters that could not be loaded lately.", label
        )
        _repeat("catalog-meter", self._report)

    def _report(self) -> None:
        for name, live in self._libraries.items():
            status, tags = live.status(), {"library": name}
            if status.shelf is None:
                continue
            checked_at = status.checked_at or status.shelf.loaded_at
            self._generation.set(status.shelf.generation, tags=tags)
            self._age.set(max(0.0, time.time() - checked_at), tags=tags)
            self._adapters.set(len(status.shelf.entries), tags=tags)
            self._aside.set(len(status.out_of_service), tags=tags)


def _repeat(name: str, report: Callable[[], None]) -> None:
    """Call ``report`` now and then in a thread that ends with the process."""

    def work() -> None:
        while True:
            try:
                report()
            except Exception:
                logger.exception("%s failed", name)
            time.sleep(_EVERY_S)

    threading.Thread(target=work, name=name, daemon=True).start()
