"""Bring models and adapter libraries together: for evaluation, service and command line.

It stands above ``library`` and ``segment``, which do not know each other. ``equip`` brings one
generation together for one run. A service has two stages, in one process or in several: a
``RetrievalStage`` chooses adapters of libraries that it follows, a ``SegmentStage`` (behind a
``Lane``, its queue) loads and uses them. Between the two travel ``AdapterRef``.
"""

__all__ = [
    "AdapterRef",
    "AdapterUnavailableError",
    "Ask",
    "AttentionLora",
    "Equipment",
    "Failure",
    "Lane",
    "LiveLibrary",
    "Picked",
    "Precision",
    "RetrievalStage",
    "SegmentStage",
    "Segmented",
    "Task",
    "Wanted",
    "equip",
]

from loraseg.engine.adapter_ref import AdapterRef, AdapterUnavailableError, Failure
from loraseg.engine.assemble import AttentionLora, Equipment, Precision, Wanted, equip
from loraseg.engine.lane import Lane
from loraseg.engine.live import LiveLibrary
from loraseg.engine.retrieval import Ask, Picked, RetrievalStage
from loraseg.engine.segmenting import Segmented, SegmentStage, Task
