"""The adapter library: published adapters in a store, indexed by the centroids of their domains.

A version is an integer that its publisher reserves (``adapters/<name>/<version>.json`` is written
only if absent), not a content hash, because users read and type it. A generation is committed by
writing ``catalog/<generation>.parquet`` only if absent, before ``catalog/HEAD`` is swapped: of the
writers that start from the same generation exactly one gets the next number, the others leave
nothing behind, and the next writer completes the commit of one that died in between.
"""

from loraseg.library.audit import AuditReport
from loraseg.library.card import AdapterCard, BaseModelInfo, TrainingSet
from loraseg.library.catalog import Library
from loraseg.library.centroid import Centroid
from loraseg.library.retrieve import AdapterRetriever, RetrievedEntry
from loraseg.library.semla_format import export_loradb, import_loradb
from loraseg.library.snapshot import CatalogEntry

__all__ = [
    "AdapterCard",
    "AdapterRetriever",
    "AuditReport",
    "BaseModelInfo",
    "CatalogEntry",
    "Centroid",
    "Library",
    "RetrievedEntry",
    "TrainingSet",
    "export_loradb",
    "import_loradb",
]
