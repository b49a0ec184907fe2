"""Parquet from somebody unknown: what reading will cost is known before anything is decoded.

A page's header says how many values follow and what they unfold to, and a reader believes it: run
lengths and dictionaries let a hundred bytes stand for gigabytes. So only what the format of shards
needs is let through (plain pages without dictionary, not compressed or by zstd), and the header of
every page is read here and held against the footer and fixed bounds. The headers are Thrift
structures in the compact protocol (parquet-format, parquet.thrift).
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.errors import IntegrityError

__all__ = ["check_parquet"]

_CODECS = ("UNCOMPRESSED", "ZSTD")
_MOST_COLUMNS = 200
# A list with a value for each of 65,535 classes in each of 64 rows.
_MOST_VALUES = 64 * 2**16
_MOST_UNFOLDED_BYTES = 256 * 2**20  # of one compressed column in one row group
_DEEPEST = 8
_DATA_PAGE = 0
_PLAIN = 0
# Field ids of PageHeader and DataPageHeader.
_TYPE, _UNFOLDED, _STORED, _DATA_PAGE_HEADER = 1, 2, 3, 5
_VALUES, _ENCODING = 1, 2


def check_parquet(data: bytes, where: str, *, most_rows: int) -> pq.ParquetFile:
    """Open a file whose row groups can be read one by one in little more memory than it has bytes.

    Args:
        data: The file; it may come from anybody.
        where: What to call it in errors.
        most_rows: In a row group.

    Raises:
        IntegrityError: It is no Parquet file, uses other encodings, or claims more than it holds.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        metadata = file.metadata
        if metadata.num_columns > _MOST_COLUMNS:
            raise _RefusedError(f"{metadata.num_columns} columns, at most {_MOST_COLUMNS}")
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            if not 0 <= group.num_rows <= most_rows:
                raise _RefusedError(
                    f"row group {index}: {group.num_rows} rows, at most {most_rows}"
                )
            for place in range(metadata.num_columns):
                _check_column(data, group.column(place), group.num_rows)
    except _RefusedError as error:
        raise IntegrityError(f"{where}: {error}") from error
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise IntegrityError(f"{where}: not a readable Parquet file: {error}") from error
    return file


class _RefusedError(Exception):
    """Why a file is not read."""


def _check_column(data: bytes, column: Any, rows: int) -> None:
    name = column.path_in_schema
    nested = "." in name
    if column.compression not in _CODECS or column.has_dictionary_page:
        raise _RefusedError(f"{name}: compression or encoding that is not read")
    # A list may be empty, which still counts as one value.
    if not (0 <= column.num_values <= _MOST_VALUES if nested else column.num_values == rows):
        raise _RefusedError(f"{name}: {column.num_values} values in {rows} rows")
    packed = column.compression != "UNCOMPRESSED"
    limit = _MOST_UNFOLDED_BYTES if packed else column.total_compressed_size
    start, stop = column.data_page_offset, column.data_page_offset + column.total_compressed_size
    if not 4 <= start <= stop <= len(data) or column.total_uncompressed_size > limit:
        raise _RefusedError(f"{name}: its claimed size is beyond the file or {limit} bytes")
    _check_pages(_Thrift(data, start, stop), column.num_values, column.total_uncompressed_size)


def _check_pages(reader: "_Thrift", values: int, unfolded: int) -> None:
    while reader.place < reader.stop:
        header = reader.struct()
        content = header.get(_DATA_PAGE_HEADER)
        if header.get(_TYPE) != _DATA_PAGE or not isinstance(content, dict):
            raise _RefusedError("a page that is no plain data page")
        if content.get(_ENCODING) != _PLAIN:
            raise _RefusedError("a page with an encoding that is not read")
        unfolded -= _count(header, _UNFOLDED)
        values -= _count(content, _VALUES)
        reader.skip(_count(header, _STORED))
        if unfolded < 0 or values < 0:
            raise _RefusedError("a page claims more than its column")


def _count(fields: dict[int, Any], field: int) -> int:
    value = fields.get(field)
    if type(value) is not int or value < 0:
        raise _RefusedError("a page header without its sizes")
    return value


@dataclass(slots=True)
class _Thrift:
    """Reads the compact protocol from ``place`` on, never beyond ``stop``."""

    data: bytes
    place: int
    stop: int

    def skip(self, count: int) -> int:
        """Step over bytes and return where they began."""
        before = self.place
        if not 0 <= count <= self.stop - before:
            raise _RefusedError("a page is cut off")
        self.place += count
        return before

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read a structure as its fields by id; text and floats count for nothing here."""
        if depth > _DEEPEST:
            raise _RefusedError("a page header without end")
        fields: dict[int, Any] = {}
        last = 0
        while head := self._byte():
            kind, step = head & 0x0F, head >> 4
            last = last + step if step else _zigzag(self._varint())
            fields[last] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # the value of a boolean field is in its type
            return kind == 1
        if kind in (4, 5, 6):
            return _zigzag(self._varint())
        if kind in (3, 7):
            return self.skip(1 if kind == 3 else 8)
        if kind == 8:
            return self.skip(self._varint())
        if kind == 12:
            return self.struct(depth + 1)
        raise _RefusedError(
            "a page header of another form"
        )  # lists and maps: none in a page header

    def _byte(self) -> int:
        return self.data[self.skip(1)]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise _RefusedError("a number of over 64 bits")


def _zigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
