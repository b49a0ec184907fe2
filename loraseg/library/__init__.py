"""The adapter library: published adapters in a store, indexed by where their domains lie.

Why a version is an integer that its publisher reserves (``adapters/<name>/<version>.json`` is put
only if absent) and not a content id: people read and type it. Why a generation is committed by
putting ``catalog/<generation>.parquet`` if absent, before ``catalog/HEAD`` is swapped: of the
writers that built upon the same generation exactly one gets the next number, a losing writer
leaves nothing behind, and a writer that dies in between is finished by whoever comes next.
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
