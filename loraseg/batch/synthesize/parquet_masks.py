"""Masks in Parquet files of users, read in bounded memory and cached by row group."""

import bisect
import itertools
import threading
from dataclasses import dataclass
from typing import Any

from loraseg.data.parquet_limits import CheckedParquet, ParquetLimits, open_checked_parquet
from loraseg.errors import DatasetError
from loraseg.lru_cache import LruCache
from loraseg.storage import ObjectStore

__all__ = ["ParquetMaskReader"]

Masks = list[bytes | None]

_MAX_ROWS = 2**20
# Limit of one column in one row group, for its pages and for its cells.
_MAX_BYTES = 256 * 2**20
# Memory of a Python object besides the bytes of a cell.
_CELL_OVERHEAD_BYTES = 64
_FILE_CACHE_BYTES = 256 * 2**20
# Two row groups or more: threads that read rows in order read two of them at the same time.
_MASK_CACHE_BYTES = 2 * _MAX_BYTES
_MASK_COLUMNS = ("mask", "mask.bytes")  # Hugging Face stores images as structs


class ParquetMaskReader:
    """Reads the columns ``name`` and ``mask`` of a store's Parquet files; threads may share it.

    Caches up to 256 MiB of files (at least one) and 512 MiB of masks.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Create empty caches; nothing is read."""
        self._store = store
        # Held while a file is read and decoded, so that two threads do not do so for one file.
        self._lock = threading.Lock()
        self._files: LruCache[str, _ParquetFile] = LruCache(
            _FILE_CACHE_BYTES, lambda file: file.size_bytes
        )
        self._masks: LruCache[tuple[str, int], Masks | DatasetError] = LruCache(
            _MASK_CACHE_BYTES, _masks_size
        )
        # Kept for all files, so that a cached mask is found without its file.
        self._row_group_ends: dict[str, tuple[int, ...]] = {}

    def names(self, key: str) -> list[str]:
        """Return the name of each row; without a text it is the key and the row's number.

        Raises:
            DatasetError: The object is not a Parquet file, or a row group is too large.
            StoreError: The store cannot be read.
        """
        with self._lock:
            file = self._file(key)
            groups = range(len(file.row_group_ends))
            if (masks := file.column(*_MASK_COLUMNS)) is not None:
                for group in groups:
                    file.parquet.check_column(group, masks)
            names: list[Any] = [None] * file.rows
            if (column := file.column("name")) is not None:
                names = [name for group in groups for name in file.cells(group, column)]
        return [name if isinstance(name, str) else f"{key}#{row}" for row, name in enumerate(names)]

    def mask(self, key: str, row: int) -> bytes | None:
        """Return the PNG file in a row; None if the row has none.

        Raises:
            DatasetError: The object is not a Parquet file or has no such column, or the row group
                is too large.
            IndexError: There is no such row.
            StoreError: The store cannot be read.
        """
        with self._lock:
            ends = self._row_group_ends.get(key) or self._file(key).row_group_ends
            group = bisect.bisect_right(ends, row)
            masks = self._masks.get_or_create(
                (key, group), lambda: _read_masks(self._file(key), group)
            )
        if isinstance(masks, DatasetError):
            raise DatasetError(str(masks)) from masks
        return masks[row - (ends[group - 1] if group else 0)]

    def _file(self, key: str) -> "_ParquetFile":
        def read() -> _ParquetFile:
            file = _open(self._store.get(key), f"{self._store.uri}/{key}")
            self._row_group_ends[key] = file.row_group_ends
            return file

        return self._files.get_or_create(key, read)


@dataclass(frozen=True, slots=True, eq=False)
class _ParquetFile:
    """An open file; ``row_group_ends`` has the number of rows up to the end of each row group."""

    parquet: CheckedParquet
    size_bytes: int
    row_group_ends: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.row_group_ends[-1] if self.row_group_ends else 0

    def column(self, *paths: str) -> str | None:
        """Return the first of the paths that is a column with one value per row."""
        return next((path for path in paths if self.parquet.has_column(path)), None)

    def cells(self, group: int, path: str) -> list[bytes | str | None]:
        """Return the cells of a column in a row group; None for values other than bytes or text."""
        batches = self.parquet.batches(group, [path])
        return [_cell_value(cell) for batch in batches for cell in batch.column(0)]


def _open(data: bytes, where: str) -> _ParquetFile:
    limits = ParquetLimits(group_rows=_MAX_ROWS, column_bytes=_MAX_BYTES)
    parquet = open_checked_parquet(data, where, limits, error=DatasetError)
    ends = tuple(itertools.accumulate(parquet.group_rows))
    if ends and ends[-1] > _MAX_ROWS:
        raise DatasetError(f"{where}: {ends[-1]} rows, at most {_MAX_ROWS}; split the file")
    return _ParquetFile(parquet, len(data), ends)


def _read_masks(file: _ParquetFile, group: int) -> Masks | DatasetError:
    """Return the masks of a row group, or the error that every row of it raises."""
    where = file.parquet.where
    if group >= len(file.row_group_ends):
        raise IndexError(f"{where}: it has {file.rows} rows")
    path = file.column(*_MASK_COLUMNS)
    if path is None:
        raise DatasetError(f"{where}: no column 'mask' of PNG bytes")
    try:
        return [cell if isinstance(cell, bytes) else None for cell in file.cells(group, path)]
    except DatasetError as error:
        return DatasetError(str(error))  # without the traceback, which keeps the cells alive


def _cell_value(cell: Any) -> bytes | str | None:
    try:
        value = cell.as_py()
    except UnicodeDecodeError:
        return None
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes | str) else None


def _masks_size(masks: Masks | DatasetError) -> int:
    if isinstance(masks, DatasetError):
        return 0
    return sum(_CELL_OVERHEAD_BYTES + len(cell or b"") for cell in masks)
