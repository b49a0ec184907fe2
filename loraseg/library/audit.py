"""Checks a library for missing, damaged and unreferenced objects."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from loraseg.errors import IntegrityError
from loraseg.library import records
from loraseg.library.snapshot import CatalogEntry
from loraseg.storage import ObjectStore

__all__ = ["AuditReport", "audit"]

_SNAPSHOT_KEY = re.compile(r"catalog/(\d{8,})\.parquet")


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The result of a check.

    Attributes:
        missing: Keys that the catalog refers to and the store lacks.
        corrupt: Keys whose bytes differ from their digest.
        garbage: Keys that no version refers to: left by a publisher that died, or written by a
            publisher that is still running.
        checked: Number of objects that were read and compared.
    """

    missing: tuple[str, ...]
    corrupt: tuple[str, ...]
    garbage: tuple[str, ...]
    checked: int

    @property
    def ok(self) -> bool:
        """Whether every published adapter can be loaded."""
        return not self.missing and not self.corrupt


def audit(
    store: ObjectStore,
    entries: Iterable[CatalogEntry],
    generation: int,
    existing_keys: Collection[str],
) -> AuditReport:
    """Read every object that ``entries`` refer to, one at a time.

    Args:
        store: The store of the library.
        entries: The entries of one generation.
        generation: The number of the generation.
        existing_keys: All keys, listed before the generation was read.
    """
    records_of = {records.record_key(e.name, e.version): e for e in entries}
    missing: set[str] = set()
    corrupt: set[str] = set()
    blobs: set[str] = set()
    for key, entry in sorted(records_of.items()):
        try:
            record = records.read_record(store, entry)
        except IntegrityError:
            (corrupt if store.exists(key) else missing).add(key)
            continue
        blobs.update(blob.sha256 for blob in record.files.values())
    for digest in sorted(blobs):
        key = records.blob_key(digest)
        try:
            records.read_blob(store, digest)
        except IntegrityError:
            (corrupt if store.exists(key) else missing).add(key)
    referred = set(records_of) | {records.blob_key(digest) for digest in blobs}
    return AuditReport(
        missing=tuple(sorted(missing)),
        corrupt=tuple(sorted(corrupt)),
        garbage=tuple(
            sorted(key for key in set(existing_keys) - referred if _is_garbage(key, generation))
        ),
        checked=len(records_of) + len(blobs),
    )


def _is_garbage(key: str, generation: int) -> bool:
    if key.startswith(("blobs/", "adapters/")):
        return True
    match = _SNAPSHOT_KEY.fullmatch(key)
    # The next generation may be committed before HEAD points to it.
    if match:
        return not 1 <= int(match.group(1)) <= generation + 1
    return key.startswith("catalog/") and key != records.HEAD_KEY
