"""Reads a synthetic dataset: the shards of one manifest."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from hashlib import sha256

from loraseg.data.labels import LabelSpace
from loraseg.data.shards.manifest import ShardEntry, ShardManifest, read_manifest
from loraseg.data.shards.schema import PairRow, PairStatus, read_rows
from loraseg.errors import DatasetError, IntegrityError
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store

__all__ = ["ShardDataset"]

_PAIR_ID_LENGTH = 64


class ShardDataset:
    """The committed shards of a synthetic dataset, opened with :meth:`open`.

    What is committed later is not seen. It travels between processes, where its store is opened
    again by URI.

    Attributes:
        store: The store of the dataset.
        manifest: The manifest at the time of opening.
    """

    def __init__(self, store: ObjectStore, manifest: ShardManifest) -> None:
        self.store = store
        self.manifest = manifest

    @classmethod
    def open(cls, source: str | ObjectStore) -> "ShardDataset":
        """Open the dataset at a store URI, or at the root of a store.

        Raises:
            ConfigError: The URI is malformed.
            DatasetError: Nothing is committed there.
            IntegrityError: The manifest is damaged.
            StoreError: The store cannot be read.
        """
        store = open_store(source) if isinstance(source, str) else source
        found = read_manifest(store)
        if found is None:
            raise DatasetError(f"{store.uri}: no manifest.json, so no synthetic data is committed")
        return cls(store, found[0])

    def __reduce__(self) -> tuple[Callable[..., "ShardDataset"], tuple[str, ShardManifest]]:
        """Pickle without connections, which other processes cannot use."""
        return _reopen, (self.store.uri, self.manifest)

    def __len__(self) -> int:
        """Return the number of ``ok`` pairs."""
        return self.manifest.pairs

    @cached_property
    def classes(self) -> LabelSpace:
        """The classes.

        Raises:
            DatasetError: There are over 255 of them, or two that only differ in case or blanks;
                ``manifest.classes`` has the names in any case.
        """
        return LabelSpace(self.manifest.classes)

    def rows(
        self,
        *,
        statuses: Collection[PairStatus] = ("ok",),
        columns: Collection[str] | None = None,
        verify: bool = True,
    ) -> Iterator[PairRow]:
        """Yield rows shard by shard, in the order of the manifest.

        Args:
            statuses: The rows to yield.
            columns: As in :func:`loraseg.data.shards.schema.read_rows`.
            verify: Whether to compare every shard with its sha256 before its rows are read.

        Raises:
            DatasetError: There is no such column.
            IntegrityError: A shard is missing, damaged or differs from the manifest.
            StoreError: The store cannot be read.
        """
        for entry in self.manifest.shards:
            if any(entry.statuses.get(status) for status in statuses):
                rows = self.read_shard(entry, columns=columns, verify=verify)
                yield from (row for row in rows if row.status in statuses)

    def read_shard(
        self, entry: ShardEntry, *, columns: Collection[str] | None = None, verify: bool = True
    ) -> Iterator[PairRow]:
        """Yield all rows of a shard; arguments and errors as in :meth:`rows`."""
        where = f"{self.store.uri}/{entry.file}"
        counts = dict.fromkeys(entry.statuses, 0)
        data = self._read_verified(entry, where, verify)
        for row in read_rows(data, where, columns=columns, classes=self.manifest.classes):
            counts[row.status] += 1
            yield row
        if counts != entry.statuses:
            raise IntegrityError(f"{where}: rows {counts}, but the manifest has {entry.statuses}")

    def find_pair(self, pair_id_prefix: str) -> PairRow:
        """Return the pair, of any status, whose id starts with a prefix.

        Raises:
            DatasetError: There is none, or more than one.
            IntegrityError: As in :meth:`rows`.
            StoreError: The store cannot be read.
        """
        found: list[PairRow] = []
        for entry in self.manifest.shards:
            ids = (row.pair_id for row in self.read_shard(entry, columns=("pair_id",)))
            if any(_has_prefix(pair_id, pair_id_prefix) for pair_id in ids):
                rows = self.read_shard(entry)
                found += [row for row in rows if _has_prefix(row.pair_id, pair_id_prefix)]
            if len(found) > 1 or (found and len(pair_id_prefix) == _PAIR_ID_LENGTH):
                break
        if len(found) != 1:
            raise DatasetError(_match_error(self.store.uri, pair_id_prefix, found))
        return found[0]

    def _read_verified(self, entry: ShardEntry, where: str, verify: bool) -> bytes:
        try:
            data = self.store.get(entry.file)
        except ObjectNotFoundError as error:
            raise IntegrityError(f"{where}: the manifest names it, but it is gone") from error
        if len(data) != entry.size_bytes:
            raise IntegrityError(f"{where}: {len(data)} bytes, expected {entry.size_bytes}")
        if verify and (digest := sha256(data).hexdigest()) != entry.sha256:
            raise IntegrityError(f"{where}: sha256 {digest}, expected {entry.sha256}")
        return data


def _reopen(uri: str, manifest: ShardManifest) -> ShardDataset:
    return ShardDataset(open_store(uri), manifest)


def _has_prefix(pair_id: str | None, prefix: str) -> bool:
    return pair_id is not None and pair_id.startswith(prefix)


def _match_error(uri: str, prefix: str, matches: Sequence[PairRow]) -> str:
    if not matches:
        return f"{uri}: no pair {prefix[:80]!r}"
    some = ", ".join(str(row.pair_id) for row in matches[:3])
    return f"{uri}: pair {prefix[:80]!r} is not clear: {some}"
