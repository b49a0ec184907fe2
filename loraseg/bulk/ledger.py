"""What is done already, read from the explanation files of the output."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from loraseg.bulk.mask_names import digest_of
from loraseg.bulk.rows import Done, ledger_rows
from loraseg.storage import ObjectStore
from loraseg.tensor_types import ndarray

__all__ = ["FOLDER", "FileFacts", "Ledger", "etag_digest", "read_ledger", "retire"]

FOLDER = "explanations"
_READERS = 8


@dataclass(frozen=True, slots=True)
class FileFacts:
    """An explanation file: its bytes' digest and how many of its images ended how."""

    sha256: str
    statuses: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Ledger:
    """The images that are done, in about 40 bytes each.

    Attributes:
        files: By key of the explanation file.
        names: The keys of ``files``, in their order.
        ids: Digests of the images' keys, sorted, as pairs (n, 2) of uint64; all 16 bytes count,
            since whoever chooses the keys must not be able to hide one image behind another.
        etags: Of each image as it was read, uint64 (n,).
        places: Index of each image's file in ``names``, int32 (n,).
        masks: Digests of the keys of all masks, sorted, uint64 (m, 2).
    """

    files: dict[str, FileFacts]
    names: tuple[str, ...]
    ids: ndarray
    etags: ndarray
    places: ndarray
    masks: ndarray

    def etag_of(self, key_id: bytes) -> tuple[int, str] | None:
        """Return the digest of the etag and the file of an image that is done, else None."""
        place = _find(self.ids, key_id)
        if place is None:
            return None
        return int(self.etags[place]), self.names[self.places[place]]

    def __contains__(self, key_id: bytes) -> bool:
        return _find(self.ids, key_id) is not None

    def holds_mask(self, name: str) -> bool:
        """Return whether an image that is done has this mask."""
        return _find(self.masks, digest_of(name)) is not None


@dataclass(slots=True)
class _Columns:
    files: dict[str, FileFacts] = field(default_factory=dict[str, FileFacts])
    ids: list[ndarray] = field(default_factory=list[ndarray])
    etags: list[ndarray] = field(default_factory=list[ndarray])
    places: list[ndarray] = field(default_factory=list[ndarray])
    masks: list[ndarray] = field(default_factory=list[ndarray])


def read_ledger(output: ObjectStore) -> Ledger:
    """Read all explanation files of an output.

    Raises:
        IntegrityError: One is damaged.
        StoreError: The store cannot be read.
    """
    columns = _Columns()
    for name, (facts, rows) in _read_all(output):
        columns.places.append(np.full(len(rows), len(columns.files), dtype=np.int32))
        columns.files[name] = facts
        columns.ids.append(_pairs(bytes.fromhex(row.id) for row in rows))
        columns.etags.append(np.array([etag_digest(row.etag) for row in rows], dtype=np.uint64))
        columns.masks.append(_pairs(digest_of(row.mask) for row in rows if row.mask is not None))
    none = np.zeros((0, 2), dtype=np.uint64)
    ids, masks = np.concatenate([none, *columns.ids]), np.concatenate([none, *columns.masks])
    order = np.lexsort((ids[:, 1], ids[:, 0]))
    return Ledger(
        columns.files,
        tuple(columns.files),
        ids[order],
        np.concatenate([none[:, 0], *columns.etags])[order],
        np.concatenate([np.zeros(0, dtype=np.int32), *columns.places])[order],
        masks[np.lexsort((masks[:, 1], masks[:, 0]))],
    )


def retire(output: ObjectStore, file: str) -> None:
    """Take back an explanation file and the masks it names, so that its images are done anew.

    The file goes last: killed before, the next run finds it again.
    """
    for row in ledger_rows(output.get(file), f"{output.uri}/{file}"):
        if row.mask is not None:
            output.delete(row.mask)
    output.delete(file)


def etag_digest(etag: str) -> int:
    """Return 64 bits that stand for an etag."""
    return int.from_bytes(digest_of(etag)[:8], "big")


def _read_all(output: ObjectStore) -> Iterator[tuple[str, tuple[FileFacts, list[Done]]]]:
    def read(name: str) -> tuple[FileFacts, list[Done]]:
        data = output.get(name)
        rows = ledger_rows(data, f"{output.uri}/{name}")
        statuses = dict(sorted(Counter(row.status for row in rows).items()))
        return FileFacts(hashlib.sha256(data).hexdigest(), statuses), rows

    names = [name for name in output.list(f"{FOLDER}/") if name.endswith(".parquet")]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="ledger") as pool:
        for start in range(0, len(names), 16 * _READERS):
            some = names[start : start + 16 * _READERS]
            yield from zip(some, pool.map(read, some), strict=True)


def _pairs(digests: Iterable[bytes]) -> ndarray:
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _find(table: ndarray, digest: bytes) -> int | None:
    high, low = _pairs([digest])[0]
    start, stop = np.searchsorted(table[:, 0], high), np.searchsorted(table[:, 0], high, "right")
    inside = np.flatnonzero(table[start:stop, 1] == low)
    return int(start + inside[0]) if len(inside) else None
