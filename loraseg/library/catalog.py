"""The library: publishes, reads, rolls back and checks adapters in an object store.

Layout below the store's root::

    blobs/sha256/<aa>/<digest>          immutable adapter files
    adapters/<name>/<version>.json      immutable card and digests of its files
    catalog/<generation>.parquet        immutable snapshot, see loraseg.library.snapshot
    catalog/HEAD                        the newest generation and the sha256 of its snapshot
"""

import dataclasses
import difflib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from loraseg.adapters.peft_io import files_digest
from loraseg.errors import AdapterNotFoundError, IntegrityError, StoreError
from loraseg.library import records
from loraseg.library.audit import AuditReport, audit
from loraseg.library.card import AdapterCard, check_name
from loraseg.library.contention import ContentionBackoff
from loraseg.library.records import AdapterRecord, CatalogHead, PublishedAdapter
from loraseg.library.snapshot import CatalogEntry, decode_snapshot, encode_snapshot
from loraseg.storage.store import ObjectNotFoundError, ObjectStore
from loraseg.storage.uri import open_store, probe_conditional_writes

__all__ = ["Library", "PublishItem"]

logger = logging.getLogger(__name__)

PublishItem = tuple[str, Mapping[str, bytes], AdapterCard]
_Snapshot = tuple[CatalogHead, tuple[CatalogEntry, ...]]

_COMMIT_TIMEOUT_S = 300.0
# A writer swaps HEAD milliseconds after its snapshot; one that takes longer is considered dead.
_STALLED_WRITER_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class _CatalogState:
    """The catalog at one moment; ``etag`` is that of HEAD, None if HEAD does not exist."""

    head: CatalogHead
    etag: str | None
    entries: tuple[CatalogEntry, ...]


CatalogChange = Callable[[tuple[CatalogEntry, ...]], tuple[CatalogEntry, ...]]


class Library:
    """Adapters in a store, safe for any number of writers and readers in any process.

    Published objects are never changed or removed; only the version that a name points to changes.
    Threads may share an instance.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Use ``store``; no connection is made."""
        self._store = store
        self._lock = threading.Lock()
        self._cached_snapshot: _Snapshot = (CatalogHead.empty(), ())
        self._probed = False
        self._backoff = ContentionBackoff()

    @classmethod
    def open(cls, uri: str) -> "Library":
        """Open the library at a store URI; no connection is made."""
        return cls(open_store(uri))

    @property
    def uri(self) -> str:
        """The URI of the store."""
        return self._store.uri

    def generation(self) -> int:
        """Return the number of the newest generation; 0 for an empty library."""
        return self._read_head()[0].generation

    def head(self) -> CatalogHead:
        """Return the number and sha256 of the newest generation; reads about a hundred bytes."""
        return self._read_head()[0]

    def entries_at(self, head: CatalogHead) -> tuple[CatalogEntry, ...]:
        """Return the current version of every adapter in the generation of a :meth:`head`.

        Raises:
            IntegrityError: The catalog is damaged.
        """
        return tuple(entry for entry in self._read_snapshot(head) if entry.current)

    def entries(self, generation: int | None = None) -> tuple[CatalogEntry, ...]:
        """Return the current version of every adapter, ordered by name.

        Args:
            generation: The generation to read; None for the newest.

        Raises:
            AdapterNotFoundError: There is no such generation.
            IntegrityError: The catalog is damaged.
        """
        return tuple(entry for entry in self._all_entries(generation) if entry.current)

    def versions(self, name: str) -> tuple[CatalogEntry, ...]:
        """Return all versions of an adapter, ascending; empty if there is none."""
        return tuple(entry for entry in self._all_entries(None) if entry.name == name)

    def entry(self, name: str, version: int | None = None) -> CatalogEntry:
        """Return one version of an adapter.

        Args:
            name: The adapter.
            version: None for the version that the name points to.

        Raises:
            AdapterNotFoundError: There is no such adapter or version.
        """
        return _find_entry(self._all_entries(None), name, version, self.uri)

    def load(self, name: str, version: int | None = None) -> tuple[dict[str, bytes], AdapterCard]:
        """Return the verified files of an adapter, and its card.

        Raises:
            AdapterNotFoundError: There is no such adapter or version.
            IntegrityError: A stored object is missing or differs from its digest.
        """
        return self.load_entry(self.entry(name, version))

    def load_entry(self, entry: PublishedAdapter) -> tuple[dict[str, bytes], AdapterCard]:
        """Return the files and card of an entry, which may be of an older generation.

        Raises:
            IntegrityError: A stored object is missing or differs from its digest.
        """
        record = records.read_record(self._store, entry)
        files = {
            file: records.read_blob(self._store, blob.sha256) for file, blob in record.files.items()
        }
        if files_digest(files) != entry.digest:
            raise IntegrityError(f"{entry.name} version {entry.version}: wrong adapter digest")
        return files, record.card

    def publish(self, name: str, files: Mapping[str, bytes], card: AdapterCard) -> CatalogEntry:
        """Publish one adapter; it becomes the version that its name points to.

        If the catalog has an entry with the same files, base, task and index encoders, that entry
        is returned: lost or damaged blobs are restored, and the current version of the name stays,
        so that repeating a job does not undo a rollback.

        Args:
            name: Equal to ``card.name``.
            files: ``adapter_config.json`` and ``adapter_model.safetensors`` as peft writes them,
                and optionally other files.
            card: Stored in the record and the catalog.

        Raises:
            IntegrityError: Name, card or files are not acceptable, or the catalog is damaged.
            StoreError: The store cannot be reached or does not support conditional writes.
        """
        return self.publish_all([(name, files, card)])[0]

    def publish_all(self, items: Sequence[PublishItem]) -> tuple[CatalogEntry, ...]:
        """Publish several adapters, of different names, in one generation.

        Raises:
            IntegrityError: As :meth:`publish`, or a name occurs twice.
            StoreError: As :meth:`publish`.
        """
        started = time.perf_counter()
        names = [name for name, _, _ in items]
        if len(set(names)) != len(names):
            raise IntegrityError("cannot publish two adapters of one name in one generation")
        prepared = [AdapterRecord.from_files(name, files, card) for name, files, card in items]
        self._probe_store()
        for _, files, _ in items:
            records.write_blobs(self._store, files)
        new = tuple(
            entry for record in prepared if (entry := self._reserve_version(record)) is not None
        )
        entries = self._commit(lambda known: _with_published(known, new))
        wanted = {_publication_key(record) for record in prepared}
        found = {entry.name: entry for entry in entries if _publication_key(entry) in wanted}
        seconds = time.perf_counter() - started
        logger.info("published %d of %d adapters in %.2f s", len(new), len(items), seconds)
        return tuple(found[name] for name in names)

    def rollback(self, name: str, version: int) -> CatalogEntry:
        """Make another version of a name the current one, in a new generation.

        Raises:
            AdapterNotFoundError: There is no such adapter or version.
        """
        self._probe_store()
        entries = self._commit(lambda known: _with_current_version(known, name, version, self.uri))
        return _find_entry(entries, name, version, self.uri)

    def retire(self, name: str) -> None:
        """Make no version of a name the current one, so that it is neither listed nor retrieved.

        Nothing is deleted: :meth:`rollback` to any version, or publishing other files, makes the
        name available again. Publishing the same files does not.

        Raises:
            AdapterNotFoundError: There is no such adapter.
        """
        self._probe_store()
        self._commit(lambda known: _with_current_version(known, name, None, self.uri))

    def verify(self) -> AuditReport:
        """Read every object that the newest generation refers to and check its digest."""
        # Listed first, so that objects published during the check are not reported as garbage.
        present = set(self._store.list())
        head, _ = self._read_head()
        return audit(self._store, self._read_snapshot(head), head.generation, present)

    def _probe_store(self) -> None:
        if not self._probed:
            probe_conditional_writes(self._store)
            self._probed = True

    def _all_entries(self, generation: int | None) -> tuple[CatalogEntry, ...]:
        head, _ = self._read_head()
        if generation is None or generation == head.generation:
            return self._read_snapshot(head)
        if not 0 <= generation < head.generation:
            raise AdapterNotFoundError(
                f"{self.uri}: no generation {generation}; the newest is {head.generation}"
            )
        return self._read_snapshot(CatalogHead(generation, None))

    def _read_head(self) -> tuple[CatalogHead, str | None]:
        try:
            data, etag = self._store.get_with_etag(records.HEAD_KEY)
        except ObjectNotFoundError:
            return CatalogHead.empty(), None
        return CatalogHead.from_bytes(data), etag

    def _read_snapshot(self, head: CatalogHead) -> tuple[CatalogEntry, ...]:
        if head.generation == 0:
            return ()
        with self._lock:
            known, entries = self._cached_snapshot
        if known == head:
            return entries
        data = records.read_snapshot(self._store, head)
        where = f"{self.uri}/{records.snapshot_key(head.generation)}"
        entries = decode_snapshot(data, where, entries)
        self._cache_snapshot(CatalogHead.from_snapshot(head.generation, data), entries)
        return entries

    def _cache_snapshot(self, head: CatalogHead, entries: tuple[CatalogEntry, ...]) -> None:
        with self._lock:
            if head.generation >= self._cached_snapshot[0].generation:
                self._cached_snapshot = (head, entries)

    def _reserve_version(self, record: AdapterRecord) -> CatalogEntry | None:
        """Reserve a version number for the record; None if name and digest are published already.

        An equal record that a dead publisher left behind is reused.
        """
        versions = self.versions(record.card.name)
        if any(_publication_key(entry) == _publication_key(record) for entry in versions):
            return None
        version = max((entry.version for entry in versions), default=0) + 1
        while not records.write_record(self._store, record, version):
            version += 1
        return record.to_entry(version)

    def _commit(self, change: CatalogChange) -> tuple[CatalogEntry, ...]:
        """Apply an idempotent change to the newest generation and publish the result.

        The change is committed when HEAD is swapped from the generation that it was applied to.
        Otherwise it is applied again to the newest generation; if it was committed after all, that
        has no effect.
        """
        started = moved_at = time.monotonic()
        last: CatalogHead | None = None
        self._backoff.wait()
        while True:
            head, etag = self._read_head()
            state = _CatalogState(head, etag, self._read_snapshot(head))
            entries = change(state.entries)
            if entries == state.entries:
                return entries
            if head != last:
                last, moved_at = head, time.monotonic()
            if self._try_commit(state, entries):
                self._backoff.succeeded()
                return entries
            now = time.monotonic()
            if now - started > _COMMIT_TIMEOUT_S:
                raise StoreError(
                    f"{self.uri}: could not publish within {_COMMIT_TIMEOUT_S:.0f} s because of "
                    "other writers; try again"
                )
            if now - moved_at > _STALLED_WRITER_S:
                self._complete_stalled_commit(state)
            self._backoff.failed()
            self._backoff.wait()

    def _try_commit(self, state: _CatalogState, entries: tuple[CatalogEntry, ...]) -> bool:
        """Commit ``entries`` as the next generation; False if another writer was faster."""
        key = records.snapshot_key(state.head.generation + 1)
        if self._store.exists(key):
            return False
        data = encode_snapshot(entries)
        if not self._store.put_if_absent(key, data):
            return False
        head = CatalogHead.from_snapshot(state.head.generation + 1, data)
        # The generation is reserved, so HEAD can only move to it. If HEAD has moved already,
        # another writer has completed the commit; otherwise the commit is incomplete.
        swapped = self._swap_head(head, state.etag)
        if not swapped and self._read_head()[0].generation < head.generation:
            return False
        self._cache_snapshot(head, entries)
        return True

    def _complete_stalled_commit(self, state: _CatalogState) -> None:
        """Swap HEAD for a writer that wrote the next generation and then stopped."""
        generation = state.head.generation + 1
        key = records.snapshot_key(generation)
        try:
            data = self._store.get(key)
        except ObjectNotFoundError:
            return
        decode_snapshot(data, f"{self.uri}/{key}")
        self._swap_head(CatalogHead.from_snapshot(generation, data), state.etag)

    def _swap_head(self, head: CatalogHead, etag: str | None) -> bool:
        if etag is None:
            return self._store.put_if_absent(records.HEAD_KEY, head.to_bytes())
        return self._store.put_if_match(records.HEAD_KEY, head.to_bytes(), etag)


def _publication_key(item: CatalogEntry | AdapterRecord) -> tuple[str, ...]:
    """Return what identifies a publication: name, files, base, task and index encoders.

    Metrics and code revision of a card may differ between repetitions of a job.
    """
    encoders = (centroid.encoder_id for centroid in item.card.centroids)
    task = str(item.card.recipe.get("task_digest"))
    return item.card.name, item.digest, item.card.base.digest, task, *encoders


def _with_published(
    entries: tuple[CatalogEntry, ...], new: Sequence[CatalogEntry]
) -> tuple[CatalogEntry, ...]:
    present = {_publication_key(entry) for entry in entries}
    added = [entry for entry in new if _publication_key(entry) not in present]
    names = {entry.name for entry in added}
    kept = [
        dataclasses.replace(entry, current=False) if entry.name in names else entry
        for entry in entries
    ]
    return tuple(sorted([*kept, *added], key=lambda entry: (entry.name, entry.version)))


def _with_current_version(
    entries: tuple[CatalogEntry, ...], name: str, version: int | None, where: str
) -> tuple[CatalogEntry, ...]:
    _versions_by_number(entries, name, where)
    if version is not None:
        _find_entry(entries, name, version, where)
    return tuple(
        dataclasses.replace(entry, current=entry.version == version)
        if entry.name == name
        else entry
        for entry in entries
    )


def _versions_by_number(
    entries: Sequence[CatalogEntry], name: str, where: str
) -> dict[int, CatalogEntry]:
    check_name(name)
    versions = {entry.version: entry for entry in entries if entry.name == name}
    if not versions:
        names = sorted({entry.name for entry in entries})
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AdapterNotFoundError(f"{where}: no adapter {name!r} among {len(names)}{hint}")
    return versions


def _find_entry(
    entries: Sequence[CatalogEntry], name: str, version: int | None, where: str
) -> CatalogEntry:
    versions = _versions_by_number(entries, name, where)
    known = ", ".join(str(number) for number in sorted(versions))
    if version is None:
        current = [entry for entry in versions.values() if entry.current]
        if not current:
            raise AdapterNotFoundError(f"{where}: {name!r} is retired; it has versions {known}")
        return current[0]
    if version not in versions:
        raise AdapterNotFoundError(f"{where}: {name!r} has no version {version}; it has {known}")
    return versions[version]
