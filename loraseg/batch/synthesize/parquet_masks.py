"""Masks in Parquet files of users, read in bounded memory.

A dictionary or a prefix that is stored once lets a small file expand to gigabytes, and no footer
says so. Therefore the sizes in the page headers are added up, and then the cells are decoded one by
one and counted.
"""

import bisect
import contextlib
import itertools
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.data.thrift import CompactReader
from loraseg.errors import DatasetError
from loraseg.lru_cache import LruCache
from loraseg.storage import ObjectStore

__all__ = ["ParquetMaskReader"]

Masks = list[bytes | None]

# Limit of one column in one row group, for its pages and for its cells.
_MAX_BYTES = 256 * 2**20
_MAX_ROWS = 2**20
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
            _FILE_CACHE_BYTES, lambda file: len(file.data)
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
                    file.check_size(group, masks)
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
    """An open file.

    Attributes:
        data: Its bytes.
        parquet: Reads them.
        row_group_ends: For each row group, the number of rows up to its end.
        where: URI for error messages.
    """

    data: bytes
    parquet: pq.ParquetFile
    row_group_ends: tuple[int, ...]
    where: str

    @property
    def rows(self) -> int:
        return self.row_group_ends[-1] if self.row_group_ends else 0

    def column(self, *paths: str) -> str | None:
        """Return the first of the paths that is a column with one value per row."""
        columns = [self.parquet.schema.column(i) for i in range(len(self.parquet.schema))]
        single = {column.path for column in columns if not column.max_repetition_level}
        return next((path for path in paths if path in single), None)

    def check_size(self, group: int, path: str) -> None:
        """Check the size of a column's decompressed pages.

        Raises:
            DatasetError: They are too large.
        """
        with _map_errors(self.where):
            meta = self.parquet.metadata.row_group(group)
            for chunk in (meta.column(i) for i in range(meta.num_columns)):
                if (
                    chunk.path_in_schema == path
                    and _decompressed_size(self.data, chunk) > _MAX_BYTES
                ):
                    raise self._too_large(group, path)

    def cells(self, group: int, path: str) -> list[bytes | str | None]:
        """Return a column's cells in a row group; a value of another type is None.

        Raises:
            DatasetError: They are too large, or the file is damaged.
        """
        self.check_size(group, path)
        cells: list[bytes | str | None] = []
        size_bytes = 0
        with _map_errors(self.where):
            # Batches of one row: pyarrow expands a whole batch before it can be counted.
            batches = self.parquet.iter_batches(
                1, row_groups=[group], columns=[path], use_threads=False
            )
            for batch in batches:
                cells.append(_cell_value(batch.column(0)[0]))
                size_bytes += _cell_size(cells[-1])
                if size_bytes > _MAX_BYTES:
                    raise self._too_large(group, path)
        rows = self.parquet.metadata.row_group(group).num_rows
        if len(cells) != rows:
            raise DatasetError(
                f"{self.where}: row group {group}: got {len(cells)} rows, expected {rows}"
            )
        return cells

    def _too_large(self, group: int, path: str) -> DatasetError:
        return DatasetError(
            f"{self.where}: row group {group}: column {path!r} expands to more than 256 MiB; "
            "write the file in smaller row groups"
        )


def _open(data: bytes, where: str) -> _ParquetFile:
    with _map_errors(where):
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        ends = tuple(itertools.accumulate(group.num_rows for group in groups))
        if ends and ends[-1] > _MAX_ROWS:
            raise DatasetError(f"{where}: {ends[-1]} rows, at most {_MAX_ROWS}; split the file")
        # pyarrow 26 aborts the process if a row group has too few columns.
        if any(group.num_columns != file.metadata.num_columns for group in groups):
            raise DatasetError(f"{where}: a row group lacks columns")
        return _ParquetFile(data, file, ends, where)


def _read_masks(file: _ParquetFile, group: int) -> Masks | DatasetError:
    """Return the masks of a row group, or the error that applies to each of its rows."""
    if group >= len(file.row_group_ends):
        raise IndexError(f"{file.where}: it has {file.rows} rows")
    path = file.column(*_MASK_COLUMNS)
    if path is None:
        raise DatasetError(f"{file.where}: no column 'mask' of PNG bytes")
    try:
        return [cell if isinstance(cell, bytes) else None for cell in file.cells(group, path)]
    except DatasetError as error:
        return DatasetError(str(error))  # the traceback of the first error references all cells


def _decompressed_size(data: bytes, chunk: Any) -> int:
    """Return the decompressed bytes of a column's pages according to their headers."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    reader = CompactReader(data, start, len(data))
    total = 0
    while reader.offset < start + chunk.total_compressed_size:
        header = reader.read_struct()
        total += header[2]
        reader.skip(header[3])
    return total


def _cell_value(cell: Any) -> bytes | str | None:
    try:
        value = cell.as_py()
    except UnicodeDecodeError:
        return None
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes | str) else None


def _masks_size(masks: Masks | DatasetError) -> int:
    return 0 if isinstance(masks, DatasetError) else sum(map(_cell_size, masks))


def _cell_size(cell: bytes | str | None) -> int:
    return _CELL_OVERHEAD_BYTES + len(cell or b"")


@contextlib.contextmanager
def _map_errors(where: str) -> Generator[None]:
    try:
        yield
    except DatasetError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DatasetError(f"{where}: not a Parquet file: {error}") from error
