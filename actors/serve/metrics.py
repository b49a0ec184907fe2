"""Prometheus metrics of the endpoint, on the metrics port of every Ray node.

Ray adds the prefix ``ray_`` to each name, and labels for deployment and replica.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ray.serve import metrics

from loraseg.inference.adapter_cache import AdapterCache
from loraseg.inference.batcher import MicroBatcher
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.watcher import LibraryWatcher
from loraseg.serving.http_api.middleware import RequestContext

__all__ = ["AdapterCacheMetrics", "CatalogMetrics", "ImageMetrics", "RequestMetrics"]

logger = logging.getLogger(__name__)

# Ray's annotations permit one label only.
Counter: Any = metrics.Counter
Gauge: Any = metrics.Gauge
Histogram: Any = metrics.Histogram

_REPORT_INTERVAL_S = 5.0
_LATENCY_BUCKETS_S = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_BATCH_SIZE_BUCKETS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class RequestMetrics:
    """HTTP requests of a gateway."""

    def __init__(self) -> None:
        self._requests = Counter(
            "loraseg_requests", "HTTP requests.", ("method", "path", "status", "code")
        )
        self._seconds = Histogram(
            "loraseg_request_seconds",
            "From a request's arrival to the last byte of its response.",
            _LATENCY_BUCKETS_S,
            ("path",),
        )

    def record(self, request: RequestContext) -> None:
        """Record a finished request."""
        status, code = str(request.status), request.problem_code or ""
        tags = {"method": request.method, "path": request.route, "status": status, "code": code}
        self._requests.inc(tags=tags)
        self._seconds.observe(max(request.duration_s, 1e-6), tags={"path": request.route})


class ImageMetrics:
    """Images of a gateway."""

    def __init__(self) -> None:
        self._images = Counter(
            "loraseg_images",
            "Segmented images; fallback=yes: the bare base was used instead of adapters.",
            ("library", "mode", "fallback"),
        )
        self._seconds = Histogram(
            "loraseg_stage_seconds",
            "Time of an image in each stage; queue is waiting and transport between stages.",
            _LATENCY_BUCKETS_S,
            ("stage",),
        )
        self._batch = Histogram(
            "loraseg_batch_images",
            "Size of the batch that an image was in.",
            _BATCH_SIZE_BUCKETS,
        )
        self._tiles = Counter("loraseg_tiles", "Tiles of large images.")

    def record(self, request: SegmentRequest, result: SegmentResult) -> None:
        """Record a segmented image."""
        explanation = result.explanation
        tags = {
            "library": request.library,
            "mode": explanation.mode,
            "fallback": "no" if explanation.fallback is None else "yes",
        }
        self._images.inc(tags=tags)
        for stage, spent_ms in result.timing_ms.items():
            self._seconds.observe(max(spent_ms / 1000, 1e-6), tags={"stage": stage})
        self._batch.observe(result.batch_size)
        if result.tiles > 1:
            self._tiles.inc(result.tiles)


class AdapterCacheMetrics:
    """Adapter cache and queue of a segmenter."""

    def __init__(self, cache: AdapterCache, batcher: MicroBatcher) -> None:
        self._cache, self._batcher = cache, batcher
        self._resident = Gauge("loraseg_adapters_resident", "Adapters in memory.")
        self._bytes = Gauge("loraseg_adapter_bytes", "Memory of the adapters.")
        self._queue = Gauge("loraseg_segmenter_images", "Images waiting for or in the model.")
        self._totals = {
            name: Counter(f"loraseg_adapter_{name}", help_text)
            for name, help_text in (
                ("hits", "Requested adapters that were in memory."),
                ("misses", "Requested adapters that were loaded."),
                ("evictions", "Adapters removed from memory."),
                ("failures", "Adapters that could not be loaded."),
                ("load_seconds", "Time spent loading adapters."),
            )
        }
        self._last = dict.fromkeys(self._totals, 0.0)
        _report_periodically("cache-meter", self._report)

    def _report(self) -> None:
        stats = asdict(self._cache.stats())
        self._resident.set(stats["resident"])
        self._bytes.set(stats["size_bytes"])
        self._queue.set(self._batcher.in_flight)
        for name, counter in self._totals.items():
            increase = stats[name] - self._last[name]
            self._last[name] = stats[name]
            if increase > 0:
                counter.inc(increase)


class CatalogMetrics:
    """Catalogs of a retrieval replica."""

    def __init__(self, libraries: Mapping[str, LibraryWatcher]) -> None:
        self._libraries = libraries
        label = ("library",)
        self._generation = Gauge("loraseg_catalog_generation", "Generation in use.", label)
        self._age = Gauge(
            "loraseg_catalog_age_seconds",
            "Time since the store last confirmed that the generation in use is the newest.",
            label,
        )
        self._adapters = Gauge("loraseg_catalog_adapters", "Adapters that fit the base.", label)
        self._quarantined = Gauge(
            "loraseg_adapters_out_of_service", "Adapters that recently could not be loaded.", label
        )
        _report_periodically("catalog-meter", self._report)

    def _report(self) -> None:
        for name, watcher in self._libraries.items():
            status, tags = watcher.status(), {"library": name}
            if status.snapshot is None:
                continue
            checked_at = status.checked_at or status.snapshot.loaded_at
            self._generation.set(status.snapshot.generation, tags=tags)
            self._age.set(max(0.0, time.time() - checked_at), tags=tags)
            self._adapters.set(len(status.snapshot.entries), tags=tags)
            self._quarantined.set(len(status.quarantined), tags=tags)


def _report_periodically(name: str, report: Callable[[], None]) -> None:
    """Call ``report`` periodically in a daemon thread."""

    def run() -> None:
        while True:
            try:
                report()
            except Exception:
                logger.exception("%s failed", name)
            time.sleep(_REPORT_INTERVAL_S)

    threading.Thread(target=run, name=name, daemon=True).start()
