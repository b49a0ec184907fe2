"""Bring models and adapter libraries together: for evaluation, service and command line.

It stands above ``library`` and ``segment``, which do not know each other. ``load_segmenter`` loads
one generation of a library for one run. A service has two stages, in one process or in several: a
``RetrievalStage`` chooses adapters of libraries that it follows, a ``SegmentationStage`` (behind a
``MicroBatcher``, its queue) loads and uses them.
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
    "RetrievalStage",
    "SegmentRequest",
    "SegmentResult",
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
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.retrieval import RetrievalStage
from loraseg.inference.segmentation import SegmentationStage
from loraseg.inference.watcher import LibraryWatcher
