"""Masks in Parquet files that anybody made: what unfolds is counted before memory is gone.

A dictionary or a prefix that is written once lets a small file stand for gigabytes, and no footer
tells. So the headers of the pages are added up, then cells are decoded one by one and counted.
"""

import bisect
import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.data.thrift import CompactReader
from loraseg.errors import DatasetError
from loraseg.storage import ObjectStore

__all__ = ["ParquetMaskReader"]

V = TypeVar("V")
Masks = list[bytes | None]

# Of one column in one row group, as pages and as cells.
_MAX_BYTES = 256 * 2**20
_MAX_ROWS = 2**20
# What Python needs beside a cell's bytes.
_CELL_OVERHEAD_BYTES = 64
_FILE_CACHE_BYTES = 256 * 2**20
# Two row groups or more: threads that read rows in their order are in two at the same time.
_MASK_CACHE_BYTES = 2 * _MAX_BYTES
_MASK_COLUMNS = ("mask", "mask.bytes")  # Hugging Face keeps images in structs


class ParquetMaskReader:
    """Reads the columns ``name`` and ``mask`` of a store's Parquet files; threads may share it.

    Files and the masks of row groups that were asked for last are remembered, up to 256 MiB of
    files (or one) and 512 MiB of masks.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Note the store; nothing is read yet."""
        self._store = store
        # Held while a file is fetched and decoded, so that no two threads do it for one file.
        self._lock = threading.Lock()
        self._files: _LruCache[_ParquetFile] = _LruCache(_FILE_CACHE_BYTES)
        self._masks: _LruCache[Masks | DatasetError] = _LruCache(_MASK_CACHE_BYTES)
        # Of every file that was opened, so that a mask that is remembered needs no file.
        self._row_group_ends: dict[str, tuple[int, ...]] = {}

    def names(self, key: str) -> list[str]:
        """Return the name of each row; one without text is called by its file and number.

        Raises:
            DatasetError: It is no Parquet file, or a row group is too large.
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
        """Return the PNG file in a row; None where there is none.

        Raises:
            DatasetError: It is no Parquet file, has no such column, or its row group is too large.
            IndexError: There is no such row.
            StoreError: The store cannot be read.
        """
        with self._lock:
            ends = self._row_group_ends.get(key) or self._file(key).row_group_ends
            group = bisect.bisect_right(ends, row)
            place = f"{key}#{group}"
            masks = self._masks.get(place)
            if masks is None:
                masks = _read_masks(self._file(key), group)
                self._masks.put(place, masks, _masks_size(masks))
        if isinstance(masks, DatasetError):
            raise DatasetError(str(masks)) from masks
        return masks[row - (ends[group - 1] if group else 0)]

    def _file(self, key: str) -> "_ParquetFile":
        file = self._files.get(key)
        if file is None:
            data = self._store.get(key)
            file = _open(data, f"{self._store.uri}/{key}")
            self._files.put(key, file, len(data))
            self._row_group_ends[key] = file.row_group_ends
        return file


class _LruCache(Generic[V]):
    """Values by key; what was not asked for longest goes, but never the last one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._size_bytes = max_bytes, 0
        self._values: OrderedDict[str, tuple[V, int]] = OrderedDict()

    def get(self, key: str) -> V | None:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: str, value: V, size_bytes: int) -> None:
        self._values[key] = value, size_bytes
        self._size_bytes += size_bytes
        while self._size_bytes > self._max_bytes and len(self._values) > 1:
            self._size_bytes -= self._values.popitem(last=False)[1][1]


@dataclass(frozen=True, slots=True, eq=False)
class _ParquetFile:
    """An open file.

    Attributes:
        data: Its bytes.
        parquet: Reads them.
        row_group_ends: Of each row group, the number of the row behind its last.
        where: What errors call it.
    """

    data: bytes
    parquet: pq.ParquetFile
    row_group_ends: tuple[int, ...]
    where: str

    @property
    def rows(self) -> int:
        return self.row_group_ends[-1] if self.row_group_ends else 0

    def column(self, *paths: str) -> str | None:
        """Return the first of the paths that is a column with one value a row."""
        columns = [self.parquet.schema.column(i) for i in range(len(self.parquet.schema))]
        single = {column.path for column in columns if not column.max_repetition_level}
        return next((path for path in paths if path in single), None)

    def check_size(self, group: int, path: str) -> None:
        """Refuse a column whose pages unfold into too much."""
        with _map_errors(self.where):
            meta = self.parquet.metadata.row_group(group)
            for chunk in (meta.column(i) for i in range(meta.num_columns)):
                if (
                    chunk.path_in_schema == path
                    and _decompressed_size(self.data, chunk) > _MAX_BYTES
                ):
                    raise self._too_large(group, path)

    def cells(self, group: int, path: str) -> list[Any]:
        """Return a column's cells in a row group: bytes, text, or None for anything else."""
        self.check_size(group, path)
        found: list[Any] = []
        size_bytes = 0
        with _map_errors(self.where):
            # A row at a time: a batch is unfolded before anybody can count it.
            batches = self.parquet.iter_batches(
                1, row_groups=[group], columns=[path], use_threads=False
            )
            for batch in batches:
                found.append(_cell_value(batch.column(0)[0]))
                size_bytes += _cell_size(found[-1])
                if size_bytes > _MAX_BYTES:
                    raise self._too_large(group, path)
        rows = self.parquet.metadata.row_group(group).num_rows
        if len(found) != rows:
            raise DatasetError(
                f"{self.where}: row group {group}: got {len(found)} rows, expected {rows}"
            )
        return found

    def _too_large(self, group: int, path: str) -> DatasetError:
        return DatasetError(
            f"{self.where}: row group {group}: column {path!r} unfolds into more than 256 MiB; "
            "write the file in smaller row groups"
        )


def _open(data: bytes, where: str) -> _ParquetFile:
    with _map_errors(where):
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        ends = tuple(itertools.accumulate(group.num_rows for group in groups))
        if ends and ends[-1] > _MAX_ROWS:
            raise DatasetError(f"{where}: {ends[-1]} rows, at most {_MAX_ROWS}; split the file")
        # pyarrow 26 ends the whole process where a row group has too few columns.
        if any(group.num_columns != file.metadata.num_columns for group in groups):
            raise DatasetError(f"{where}: a row group lacks columns")
        return _ParquetFile(data, file, ends, where)


def _read_masks(file: _ParquetFile, group: int) -> Masks | DatasetError:
    """Return the masks of a row group, or why it is refused: each of its rows will ask again."""
    if group >= len(file.row_group_ends):
        raise IndexError(f"{file.where}: it has {file.rows} rows")
    path = file.column(*_MASK_COLUMNS)
    if path is None:
        raise DatasetError(f"{file.where}: no column 'mask' of PNG bytes")
    try:
        return [cell if isinstance(cell, bytes) else None for cell in file.cells(group, path)]
    except DatasetError as error:
        return DatasetError(str(error))  # the one that was raised keeps all cells alive


def _decompressed_size(data: bytes, chunk: Any) -> int:
    """Return what the pages of a column unfold to by their own headers, in bytes."""
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
