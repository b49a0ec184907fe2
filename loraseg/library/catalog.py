"""The library: publish, read, roll back and check adapters in any object store.

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
from loraseg.library.audit import Report, audit
from loraseg.library.card import Card, check_name
from loraseg.library.records import Head, Publication, Record
from loraseg.library.snapshot import Entry, decode_snapshot, encode_snapshot
from loraseg.library.turns import Turns
from loraseg.storage import ObjectNotFoundError, ObjectStore, probe_conditional_writes

__all__ = ["Item", "Library"]

logger = logging.getLogger(__name__)

Item = tuple[str, Mapping[str, bytes], Card]

_COMMIT_TIMEOUT_S = 300.0
# A writer moves HEAD milliseconds after its snapshot; who takes so much longer is taken for dead.
_GRACE_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class _State:
    """The catalog at one moment; ``etag`` is that of HEAD, None while there is none."""

    head: Head
    etag: str | None
    entries: tuple[Entry, ...]


Change = Callable[[tuple[Entry, ...]], tuple[Entry, ...]]


class Library:
    """Adapters in a store, safe for any number of writers and readers in any process.

    Nothing that was published is ever changed or removed; what moves is the version that a name
    points to. One instance may be shared by threads.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Use ``store``; nothing is contacted yet."""
        self._store = store
        self._lock = threading.Lock()
        self._known: tuple[Head, tuple[Entry, ...]] = (Head.empty(), ())
        self._probed = False
        self._turns = Turns()

    @property
    def uri(self) -> str:
        """Where the library is."""
        return self._store.uri

    def generation(self) -> int:
        """Return the number of the newest generation; 0 for an empty library."""
        return self._read_head()[0].generation

    def head(self) -> Head:
        """Return which generation is the newest, and its sha256; a hundred bytes to read."""
        return self._read_head()[0]

    def entries_at(self, head: Head) -> tuple[Entry, ...]:
        """Return the current version of every adapter in the generation of a :meth:`head`.

        Raises:
            IntegrityError: The catalog is damaged.
        """
        return tuple(entry for entry in self._read_snapshot(head) if entry.current)

    def entries(self, generation: int | None = None) -> tuple[Entry, ...]:
        """Return the current version of every adapter, ordered by name.

        Args:
            generation: Which one to read; None for the newest.

        Raises:
            AdapterNotFoundError: There is no such generation.
            IntegrityError: The catalog is damaged.
        """
        return tuple(entry for entry in self._all_entries(generation) if entry.current)

    def versions(self, name: str) -> tuple[Entry, ...]:
        """Return all versions of an adapter, ascending; empty if there is none."""
        return tuple(entry for entry in self._all_entries(None) if entry.name == name)

    def entry(self, name: str, version: int | None = None) -> Entry:
        """Return one version of an adapter.

        Args:
            name: The adapter.
            version: None for the version that the name points to.

        Raises:
            AdapterNotFoundError: There is no such adapter or version.
        """
        return _find(self._all_entries(None), name, version, self.uri)

    def load(self, name: str, version: int | None = None) -> tuple[dict[str, bytes], Card]:
        """Return an adapter's files, every byte of them verified, and its card.

        Raises:
            AdapterNotFoundError: There is no such adapter or version.
            IntegrityError: A stored object is missing or differs from its digest.
        """
        return self.load_entry(self.entry(name, version))

    def load_entry(self, entry: Publication) -> tuple[dict[str, bytes], Card]:
        """Return the files and card of a publication, which may be of an older generation.

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

    def publish(self, name: str, files: Mapping[str, bytes], card: Card) -> Entry:
        """Publish one adapter; it becomes the version that its name points to.

        An adapter that is in the catalog already, with the same files, base, task and index
        encoders, is left as it is: the entry is returned, blobs that were lost or damaged are
        restored, and the name's pointer stays, so that running a job again does not undo a
        rollback.

        Args:
            name: The same as ``card.name``.
            files: What peft writes: ``adapter_config.json`` and ``adapter_model.safetensors``,
                and at will other plain files.
            card: Goes into the record and the catalog.

        Raises:
            IntegrityError: Name, card or files are not acceptable, or the catalog is damaged.
            StoreError: The store cannot be reached or does not honour conditional writes.
        """
        return self.publish_all([(name, files, card)])[0]

    def publish_all(self, items: Sequence[Item]) -> tuple[Entry, ...]:
        """Publish several adapters, of different names, in one generation.

        Raises:
            IntegrityError: As :meth:`publish`, or a name occurs twice.
            StoreError: As :meth:`publish`.
        """
        started = time.perf_counter()
        names = [name for name, _, _ in items]
        if len(set(names)) != len(names):
            raise IntegrityError("cannot publish two adapters of one name in one generation")
        prepared = [Record.of(name, files, card) for name, files, card in items]
        self._probe()
        for _, files, _ in items:
            records.write_blobs(self._store, files)
        new = tuple(entry for record in prepared if (entry := self._reserve(record)) is not None)
        entries = self._commit(lambda known: _with_published(known, new))
        wanted = {_identity(record) for record in prepared}
        found = {entry.name: entry for entry in entries if _identity(entry) in wanted}
        seconds = time.perf_counter() - started
        logger.info("published %d of %d adapters in %.2f s", len(new), len(items), seconds)
        return tuple(found[name] for name in names)

    def rollback(self, name: str, version: int) -> Entry:
        """Let a name point to another of its versions; published as a new generation.

        Raises:
            AdapterNotFoundError: There is no such adapter or version.
        """
        self._probe()
        entries = self._commit(lambda known: _with_pointer(known, name, version, self.uri))
        return _find(entries, name, version, self.uri)

    def retire(self, name: str) -> None:
        """Let a name point to no version, so that it is neither listed nor retrieved any more.

        Nothing is deleted: :meth:`rollback` to any version brings it back, publishing other files
        too. Publishing the same again does not.

        Raises:
            AdapterNotFoundError: There is no such adapter.
        """
        self._probe()
        self._commit(lambda known: _with_pointer(known, name, None, self.uri))

    def verify(self) -> Report:
        """Read every object that the newest generation refers to and check its digest."""
        # Listed first: what is published while the check runs must not look like garbage.
        present = set(self._store.list())
        head, _ = self._read_head()
        return audit(self._store, self._read_snapshot(head), head.generation, present)

    def _probe(self) -> None:
        if not self._probed:
            probe_conditional_writes(self._store)
            self._probed = True

    def _all_entries(self, generation: int | None) -> tuple[Entry, ...]:
        head, _ = self._read_head()
        if generation is None or generation == head.generation:
            return self._read_snapshot(head)
        if not 0 <= generation < head.generation:
            raise AdapterNotFoundError(
                f"{self.uri}: no generation {generation}; the newest is {head.generation}"
            )
        return self._read_snapshot(Head(generation, None))

    def _read_head(self) -> tuple[Head, str | None]:
        try:
            data, etag = self._store.get_with_etag(records.HEAD_KEY)
        except ObjectNotFoundError:
            return Head.empty(), None
        return Head.from_bytes(data), etag

    def _read_snapshot(self, head: Head) -> tuple[Entry, ...]:
        if head.generation == 0:
            return ()
        with self._lock:
            known, entries = self._known
        if known == head:
            return entries
        data = records.read_snapshot(self._store, head)
        where = f"{self.uri}/{records.snapshot_key(head.generation)}"
        entries = decode_snapshot(data, where, entries)
        self._remember(Head.of(head.generation, data), entries)
        return entries

    def _remember(self, head: Head, entries: tuple[Entry, ...]) -> None:
        with self._lock:
            if head.generation >= self._known[0].generation:
                self._known = (head, entries)

    def _reserve(self, record: Record) -> Entry | None:
        """Take a version number for the record; None if name and digest are published already.

        A record that a publisher left behind when it died is taken over if it has the same bytes.
        """
        versions = self.versions(record.card.name)
        if any(_identity(entry) == _identity(record) for entry in versions):
            return None
        version = max((entry.version for entry in versions), default=0) + 1
        while not records.write_record(self._store, record, version):
            version += 1
        return record.entry(version)

    def _commit(self, change: Change) -> tuple[Entry, ...]:
        """Apply an idempotent change to the newest generation and publish the result.

        The change is safe when HEAD was swapped from the generation that it was applied to. In
        any other case it is applied anew to what is there then, which for a change that has
        landed after all makes no difference.
        """
        started = moved_at = time.monotonic()
        last: Head | None = None
        self._turns.wait()
        while True:
            head, etag = self._read_head()
            state = _State(head, etag, self._read_snapshot(head))
            entries = change(state.entries)
            if entries == state.entries:
                return entries
            if head != last:
                last, moved_at = head, time.monotonic()
            if self._advance(state, entries):
                self._turns.won()
                return entries
            now = time.monotonic()
            if now - started > _COMMIT_TIMEOUT_S:
                raise StoreError(
                    f"{self.uri}: could not publish within {_COMMIT_TIMEOUT_S:.0f} s because of "
                    "other writers; try again"
                )
            if now - moved_at > _GRACE_S:
                self._finish_for_others(state)
            self._turns.lost()
            self._turns.wait()

    def _advance(self, state: _State, entries: tuple[Entry, ...]) -> bool:
        """Commit ``entries`` as the next generation; False if another writer was faster."""
        key = records.snapshot_key(state.head.generation + 1)
        if self._store.exists(key):
            return False
        data = encode_snapshot(entries)
        if not self._store.put_if_absent(key, data):
            return False
        head = Head.of(state.head.generation + 1, data)
        # The generation is ours and HEAD goes nowhere else from here. If it has gone already,
        # another writer has finished for us; if it has not, nothing is won.
        swapped = self._swap_head(head, state.etag)
        if not swapped and self._read_head()[0].generation < head.generation:
            return False
        self._remember(head, entries)
        return True

    def _finish_for_others(self, state: _State) -> None:
        """Swap HEAD for a writer that committed the next generation and then went away."""
        generation = state.head.generation + 1
        key = records.snapshot_key(generation)
        try:
            data = self._store.get(key)
        except ObjectNotFoundError:
            return
        decode_snapshot(data, f"{self.uri}/{key}")
        self._swap_head(Head.of(generation, data), state.etag)

    def _swap_head(self, head: Head, etag: str | None) -> bool:
        if etag is None:
            return self._store.put_if_absent(records.HEAD_KEY, head.to_bytes())
        return self._store.put_if_match(records.HEAD_KEY, head.to_bytes(), etag)


def _identity(item: Entry | Record) -> tuple[str, ...]:
    """Tell whether publishing is a repetition: same name, files, base, task and index encoders.

    Not the whole card, whose metrics and code revision may differ without being news.
    """
    encoders = (centroid.encoder_id for centroid in item.card.centroids)
    task = str(item.card.recipe.get("task_digest"))
    return item.card.name, item.digest, item.card.base.digest, task, *encoders


def _with_published(known: tuple[Entry, ...], new: Sequence[Entry]) -> tuple[Entry, ...]:
    present = {_identity(entry) for entry in known}
    added = [entry for entry in new if _identity(entry) not in present]
    names = {entry.name for entry in added}
    kept = [
        dataclasses.replace(entry, current=False) if entry.name in names else entry
        for entry in known
    ]
    return tuple(sorted([*kept, *added], key=lambda entry: (entry.name, entry.version)))


def _with_pointer(
    known: tuple[Entry, ...], name: str, version: int | None, where: str
) -> tuple[Entry, ...]:
    _versions(known, name, where)
    if version is not None:
        _find(known, name, version, where)
    return tuple(
        dataclasses.replace(entry, current=entry.version == version)
        if entry.name == name
        else entry
        for entry in known
    )


def _versions(entries: Sequence[Entry], name: str, where: str) -> dict[int, Entry]:
    check_name(name)
    versions = {entry.version: entry for entry in entries if entry.name == name}
    if not versions:
        names = sorted({entry.name for entry in entries})
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AdapterNotFoundError(f"{where}: no adapter {name!r} among {len(names)}{hint}")
    return versions


def _find(entries: Sequence[Entry], name: str, version: int | None, where: str) -> Entry:
    versions = _versions(entries, name, where)
    known = ", ".join(str(number) for number in sorted(versions))
    if version is None:
        current = [entry for entry in versions.values() if entry.current]
        if not current:
            raise AdapterNotFoundError(f"{where}: {name!r} is retired; it has versions {known}")
        return current[0]
    if version not in versions:
        raise AdapterNotFoundError(f"{where}: {name!r} has no version {version}; it has {known}")
    return versions[version]
