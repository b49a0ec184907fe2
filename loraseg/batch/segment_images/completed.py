"""What is done already, read from the explanation files of the output."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from loraseg.batch.segment_images.mask_names import text_digest
from loraseg.batch.segment_images.table import CompletedRow, read_completed_rows
from loraseg.storage import ObjectStore
from loraseg.tensor_types import ndarray

__all__ = [
    "EXPLANATIONS_PREFIX",
    "CompletedIndex",
    "FileSummary",
    "etag_digest",
    "invalidate",
    "read_completed",
]

EXPLANATIONS_PREFIX = "explanations"
_READ_THREADS = 8


@dataclass(frozen=True, slots=True)
class FileSummary:
    """An explanation file: its bytes' digest and how many of its images ended how."""

    sha256: str
    statuses: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CompletedIndex:
    """The images that are done, in about 40 bytes each.

    Attributes:
        files: By key of the explanation file.
        file_names: The keys of ``files``, in their order.
        ids: Digests of the images' keys, sorted, as pairs (n, 2) of uint64; all 16 bytes count,
            since whoever chooses the keys must not be able to hide one image behind another.
        etags: Of each image as it was read, uint64 (n,).
        file_indices: Index of each image's file in ``file_names``, int32 (n,).
        masks: Digests of the keys of all masks, sorted, uint64 (m, 2).
    """

    files: dict[str, FileSummary]
    file_names: tuple[str, ...]
    ids: ndarray
    etags: ndarray
    file_indices: ndarray
    masks: ndarray

    def find_image(self, key_id: bytes) -> tuple[int, str] | None:
        """Return the digest of the etag and the file of an image that is done, else None."""
        place = _find_digest(self.ids, key_id)
        if place is None:
            return None
        return int(self.etags[place]), self.file_names[self.file_indices[place]]

    def __contains__(self, key_id: bytes) -> bool:
        return _find_digest(self.ids, key_id) is not None

    def has_mask(self, name: str) -> bool:
        """Return whether an image that is done has this mask."""
        return _find_digest(self.masks, text_digest(name)) is not None


@dataclass(slots=True)
class _Columns:
    files: dict[str, FileSummary] = field(default_factory=dict[str, FileSummary])
    ids: list[ndarray] = field(default_factory=list[ndarray])
    etags: list[ndarray] = field(default_factory=list[ndarray])
    file_indices: list[ndarray] = field(default_factory=list[ndarray])
    masks: list[ndarray] = field(default_factory=list[ndarray])


def read_completed(output: ObjectStore) -> CompletedIndex:
    """Read all explanation files of an output.

    Raises:
        IntegrityError: One is damaged.
        StoreError: The store cannot be read.
    """
    columns = _Columns()
    for name, (facts, rows) in _read_files(output):
        columns.file_indices.append(np.full(len(rows), len(columns.files), dtype=np.int32))
        columns.files[name] = facts
        columns.ids.append(_to_uint64_pairs(bytes.fromhex(row.id) for row in rows))
        columns.etags.append(np.array([etag_digest(row.etag) for row in rows], dtype=np.uint64))
        columns.masks.append(
            _to_uint64_pairs(text_digest(row.mask) for row in rows if row.mask is not None)
        )
    none = np.zeros((0, 2), dtype=np.uint64)
    ids, masks = np.concatenate([none, *columns.ids]), np.concatenate([none, *columns.masks])
    order = np.lexsort((ids[:, 1], ids[:, 0]))
    return CompletedIndex(
        columns.files,
        tuple(columns.files),
        ids[order],
        np.concatenate([none[:, 0], *columns.etags])[order],
        np.concatenate([np.zeros(0, dtype=np.int32), *columns.file_indices])[order],
        masks[np.lexsort((masks[:, 1], masks[:, 0]))],
    )


def invalidate(output: ObjectStore, file: str) -> None:
    """Take back an explanation file and the masks it names, so that its images are done anew.

    The file goes last: killed before, the next run finds it again.
    """
    for row in read_completed_rows(output.get(file), f"{output.uri}/{file}"):
        if row.mask is not None:
            output.delete(row.mask)
    output.delete(file)


def etag_digest(etag: str) -> int:
    """Return 64 bits that stand for an etag."""
    return int.from_bytes(text_digest(etag)[:8], "big")


def _read_files(
    output: ObjectStore,
) -> Iterator[tuple[str, tuple[FileSummary, list[CompletedRow]]]]:
    def read(name: str) -> tuple[FileSummary, list[CompletedRow]]:
        data = output.get(name)
        rows = read_completed_rows(data, f"{output.uri}/{name}")
        statuses = dict(sorted(Counter(row.status for row in rows).items()))
        return FileSummary(hashlib.sha256(data).hexdigest(), statuses), rows

    names = [name for name in output.list(f"{EXPLANATIONS_PREFIX}/") if name.endswith(".parquet")]
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="ledger") as pool:
        for start in range(0, len(names), 16 * _READ_THREADS):
            some = names[start : start + 16 * _READ_THREADS]
            yield from zip(some, pool.map(read, some), strict=True)


def _to_uint64_pairs(digests: Iterable[bytes]) -> ndarray:
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _find_digest(table: ndarray, digest: bytes) -> int | None:
    high, low = _to_uint64_pairs([digest])[0]
    start, stop = np.searchsorted(table[:, 0], high), np.searchsorted(table[:, 0], high, "right")
    inside = np.flatnonzero(table[start:stop, 1] == low)
    return int(start + inside[0]) if len(inside) else None
