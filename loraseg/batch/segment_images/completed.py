"""Index of the images that earlier runs have segmented, read from their explanation files."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from loraseg.batch.segment_images.mask_names import text_digest
from loraseg.batch.segment_images.table import CompletedRow, read_completed_rows
from loraseg.storage import ObjectStore
from loraseg.tensor_types import Int, UInt, ndarray

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
    """An explanation file: the sha256 of its bytes, and its number of images by status."""

    sha256: str
    statuses: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CompletedIndex:
    """The completed images, in about 40 bytes each.

    Attributes:
        files: Summary of each explanation file by key.
        file_names: The keys of ``files``, in their order.
        ids: Digests of the images' keys, sorted, as two uint64 each. All 16 bytes are compared:
            with 8, a user who chooses the keys could construct two images of one digest.
        etags: :func:`etag_digest` of each image as it was read.
        file_indices: Index of each image's file in ``file_names``.
        masks: Digests of the keys of all masks, sorted, as two uint64 each.
    """

    files: dict[str, FileSummary]
    file_names: tuple[str, ...]
    ids: UInt[ndarray, "n 2"]
    etags: UInt[ndarray, " n"]
    file_indices: Int[ndarray, " n"]
    masks: UInt[ndarray, "m 2"]

    def find_image(self, key_id: bytes) -> tuple[int, str] | None:
        """Return etag digest and explanation file of an image; None if it is not completed."""
        index = _find_digest(self.ids, key_id)
        if index is None:
            return None
        return int(self.etags[index]), self.file_names[self.file_indices[index]]

    def __contains__(self, key_id: bytes) -> bool:
        return _find_digest(self.ids, key_id) is not None

    def has_mask(self, name: str) -> bool:
        """Return whether a completed image has this mask."""
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
        IntegrityError: A file is damaged.
        StoreError: The store cannot be read.
    """
    columns = _Columns()
    for name, (summary, rows) in _read_files(output):
        columns.file_indices.append(np.full(len(rows), len(columns.files), dtype=np.int32))
        columns.files[name] = summary
        columns.ids.append(_to_uint64_pairs(bytes.fromhex(row.id) for row in rows))
        columns.etags.append(np.array([etag_digest(row.etag) for row in rows], dtype=np.uint64))
        columns.masks.append(
            _to_uint64_pairs(text_digest(row.mask) for row in rows if row.mask is not None)
        )
    empty = np.zeros((0, 2), dtype=np.uint64)
    ids, masks = np.concatenate([empty, *columns.ids]), np.concatenate([empty, *columns.masks])
    order = np.lexsort((ids[:, 1], ids[:, 0]))
    return CompletedIndex(
        columns.files,
        tuple(columns.files),
        ids[order],
        np.concatenate([empty[:, 0], *columns.etags])[order],
        np.concatenate([np.zeros(0, dtype=np.int32), *columns.file_indices])[order],
        masks[np.lexsort((masks[:, 1], masks[:, 0]))],
    )


def invalidate(output: ObjectStore, file: str) -> None:
    """Delete an explanation file and the masks that it names, so that its images are redone.

    The file is deleted last: after a kill the next run finds it and deletes the rest.

    Raises:
        IntegrityError: The file is damaged.
        StoreError: The store cannot be read or written.
    """
    for row in read_completed_rows(output.get(file), f"{output.uri}/{file}"):
        if row.mask is not None:
            output.delete(row.mask)
    output.delete(file)


def etag_digest(etag: str) -> int:
    """Return the first 64 bits of an etag's sha256."""
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
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="completed") as pool:
        for start in range(0, len(names), 16 * _READ_THREADS):
            chunk = names[start : start + 16 * _READ_THREADS]
            yield from zip(chunk, pool.map(read, chunk), strict=True)


def _to_uint64_pairs(digests: Iterable[bytes]) -> UInt[ndarray, "n 2"]:
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _find_digest(table: UInt[ndarray, "n 2"], digest: bytes) -> int | None:
    high, low = _to_uint64_pairs([digest])[0]
    start, stop = np.searchsorted(table[:, 0], high), np.searchsorted(table[:, 0], high, "right")
    inside = np.flatnonzero(table[start:stop, 1] == low)
    return int(start + inside[0]) if len(inside) else None
