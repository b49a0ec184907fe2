"""Load models and adapter libraries, and segment with adapters chosen for each image.

The path of an image: :class:`SegmentRequest` -> retrieval of adapters -> fusion -> model ->
:class:`SegmentResult`. :func:`load_segmenter` sets it up in this process for one library
generation. An endpoint splits it into two stages, in one process or several: a
:class:`RetrievalStage` selects adapters of libraries that it watches, a :class:`SegmentationStage`
behind a :class:`MicroBatcher` loads and fuses them.
"""

__all__ = [
    "AdapterFailure",
    "AdapterRef",
    "AdapterUnavailableError",
    "AdaptiveSegmenterConfig",
    "LibraryWatcher",
    "LoadedModels",
    "MicroBatcher",
    "RetrievalStage",
    "SegmentRequest",
    "SegmentResult",
    "SegmentationStage",
    "Segmenter",
    "SegmenterConfig",
    "build_segmenter",
    "load_models",
    "load_segmenter",
]

from loraseg.inference.adapter_ref import AdapterFailure, AdapterRef, AdapterUnavailableError
from loraseg.inference.batcher import MicroBatcher
from loraseg.inference.config import AdaptiveSegmenterConfig, SegmenterConfig
from loraseg.inference.loading import LoadedModels, build_segmenter, load_models, load_segmenter
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.retrieval import RetrievalStage
from loraseg.inference.segmentation import SegmentationStage
from loraseg.inference.segmenter import Segmenter
from loraseg.inference.watcher import LibraryWatcher
