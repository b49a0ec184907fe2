"""Bring models and adapter libraries together: for evaluation, service and command line.

It stands above ``library`` and ``segment``, which do not know each other. ``equip`` brings one
generation together for one run. A service has two stages, in one process or in several: a
``RetrievalStage`` chooses adapters of libraries that it follows, a ``SegmentationStage`` (behind a
``MicroBatcher``, its queue) loads and uses them. Between the two travel ``AdapterRef``.
"""

__all__ = [
    "AdapterFailure",
    "AdapterRef",
    "AdapterUnavailableError",
    "AttentionLoraSetting",
    "LibraryWatcher",
    "LoadedSegmenter",
    "MicroBatcher",
    "Precision",
    "RetrievalRequest",
    "RetrievalResult",
    "RetrievalStage",
    "SegmentationRequest",
    "SegmentationResult",
    "SegmentationStage",
    "SegmenterConfig",
    "load_segmenter",
]

from loraseg.inference.adapter_ref import AdapterFailure, AdapterRef, AdapterUnavailableError
from loraseg.inference.batcher import MicroBatcher
from loraseg.inference.loading import (
    AttentionLoraSetting,
    LoadedSegmenter,
    Precision,
    SegmenterConfig,
    load_segmenter,
)
from loraseg.inference.retrieval import RetrievalRequest, RetrievalResult, RetrievalStage
from loraseg.inference.segmentation import (
    SegmentationRequest,
    SegmentationResult,
    SegmentationStage,
)
from loraseg.inference.watcher import LibraryWatcher
