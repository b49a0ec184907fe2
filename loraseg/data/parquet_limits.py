"""Parquet from somebody unknown: what reading will cost is known before pyarrow sees a byte.

A page's header says how many values follow and what they unfold to, and a reader believes it: run
lengths and dictionaries let a hundred bytes stand for gigabytes. A footer that contradicts itself
can end the whole process (pyarrow 26 aborts where a row group has too few columns). So the footer
and the header of every page are read here and held against the schema that is expected, against
each other and against fixed bounds, and only plain pages without dictionaries, not compressed or
by zstd, are let through. Names and numbers are those of parquet-format's parquet.thrift.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.data.thrift import CompactReader, ThriftError
from loraseg.errors import IntegrityError

__all__ = ["open_checked_parquet"]

_MAGIC = b"PAR1"
_ARROW_SCHEMA = b"ARROW:schema"  # a second schema, which would count for more than the first
_MAX_FOOTER_BYTES = 16 * 2**20
_MAX_VALUES = 64 * 2**16  # a list with a value for each of 65,535 classes in each of 64 rows
_MAX_DECOMPRESSED_BYTES = 256 * 2**20  # of one compressed column in one row group
_UNCOMPRESSED, _ZSTD = 0, 6
_DATA_PAGE = 0
_PLAIN = 0

ThriftFields = dict[int, Any]


def open_checked_parquet(
    data: bytes, where: str, schema: pa.Schema, *, max_group_rows: int
) -> pq.ParquetFile:
    """Open a file whose row groups can be read one by one in little more memory than it has bytes.

    Args:
        data: The file; it may come from anybody.
        where: What to call it in errors.
        schema: The columns that it must have, and no others.
        max_group_rows: In a row group.

    Raises:
        IntegrityError: It is no such file, uses other encodings, or claims more than it holds.
    """
    try:
        _check_footer(data, _read_footer(data), schema, max_group_rows)
        return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    except _RejectedError as error:
        raise IntegrityError(f"{where}: {error}") from error
    except (ThriftError, pa.ArrowException, OSError, ValueError) as error:
        raise IntegrityError(f"{where}: not a readable Parquet file: {error}") from error


class _RejectedError(Exception):
    """Why a file is not read."""


def _read_footer(data: bytes) -> ThriftFields:
    size = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC:
        raise _RejectedError("not a Parquet file")
    if size > min(len(data) - 12, _MAX_FOOTER_BYTES):
        raise _RejectedError(f"a footer of {size} bytes, which it has not or is too much")
    return CompactReader(data, len(data) - 8 - size, len(data) - 8).read_struct()


@functools.cache
def _expected_layout(schema: pa.Schema) -> tuple[list[ThriftFields], list[tuple[int, list[bytes]]]]:
    """Return the elements of a schema, and the type and path of each of its leaves."""
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema, store_schema=False).close()
    elements = _schema_elements(_read_footer(sink.getvalue().to_pybytes()))
    leaves: list[tuple[int, list[bytes]]] = []

    def walk(place: int, path: list[bytes]) -> int:
        element = elements[place]
        own = [*path, element[4]] if place else path
        if not element.get(5):
            leaves.append((element[1], own))
        place += 1
        for _ in range(element.get(5, 0)):
            place = walk(place, own)
        return place

    walk(0, [])
    return elements, leaves


def _schema_elements(footer: ThriftFields) -> list[ThriftFields]:
    """Return type, repetition, name, children and converted type; the root's name is free."""
    elements = [
        {field: element.get(field) for field in (1, 3, 4, 5, 6) if element.get(field) is not None}
        for element in _struct_list(footer, 2)
    ]
    for root in elements[:1]:
        root.pop(4, None)
        root.pop(3, None)
    return elements


def _check_footer(
    data: bytes, footer: ThriftFields, schema: pa.Schema, max_group_rows: int
) -> None:
    elements, leaves = _expected_layout(schema)
    found = _schema_elements(footer)
    if found != elements:
        have = [element.get(4) for element in found]
        lacks = [name for name in schema.names if name.encode() not in have]
        raise _RejectedError(
            f"lacks column {', '.join(lacks)}" if lacks else "its columns have other types or more"
        )
    if 8 in footer or any(pair.get(1) == _ARROW_SCHEMA for pair in _struct_list(footer, 5)):
        raise _RejectedError("it is encrypted, or has a schema of Arrow beside its own")
    rows = 0
    for group in _struct_list(footer, 4):
        rows += _check_group(data, group, leaves, max_group_rows)
    if footer.get(3) != rows:
        raise _RejectedError(f"{footer.get(3)} rows, but its groups have {rows}")


def _check_group(
    data: bytes, group: ThriftFields, leaves: Sequence[tuple[int, list[bytes]]], max_group_rows: int
) -> int:
    rows = _count(group, 3)
    chunks = _struct_list(group, 1)
    if rows > max_group_rows or len(chunks) != len(leaves):
        raise _RejectedError(f"a group of {rows} rows and {len(chunks)} columns")
    for chunk, (kind, path) in zip(chunks, leaves, strict=True):
        column = chunk.get(3)
        if not isinstance(column, dict) or set(chunk) & {1, 8, 9}:
            raise _RejectedError("a column that lies elsewhere or is encrypted")
        name = b".".join(path).decode()
        fields = cast(ThriftFields, column)
        if fields.get(1) != kind or fields.get(3) != path:
            raise _RejectedError(f"{name}: a row group has something else there")
        _check_column(data, name, fields, rows)
    return rows


def _check_column(data: bytes, name: str, column: ThriftFields, rows: int) -> None:
    codec, values = _count(column, 4), _count(column, 5)
    if codec not in (_UNCOMPRESSED, _ZSTD) or 11 in column:
        raise _RejectedError(f"{name}: compression or encoding that is not read")
    # An empty list or a null counts as one value.
    if values != rows and not ("." in name and values <= _MAX_VALUES):
        raise _RejectedError(f"{name}: {values} values in {rows} rows")
    unfolded, stored, start = (_count(column, field) for field in (6, 7, 9))
    limit = _MAX_DECOMPRESSED_BYTES if codec else stored
    if start < len(_MAGIC) or start + stored > len(data) or unfolded > limit:
        raise _RejectedError(f"{name}: its claimed size is beyond the file or {limit} bytes")
    reader = CompactReader(data, start, start + stored)
    while reader.offset < reader.stop:
        header = reader.read_struct()
        page = header.get(5)
        if header.get(1) != _DATA_PAGE or not isinstance(page, dict):
            raise _RejectedError(f"{name}: a page that is no plain data page")
        fields = cast(ThriftFields, page)
        if fields.get(2) != _PLAIN:
            raise _RejectedError(f"{name}: a page with an encoding that is not read")
        unfolded -= _count(header, 2)
        values -= _count(fields, 1)
        reader.skip(_count(header, 3))
        if unfolded < 0 or values < 0:
            raise _RejectedError(f"{name}: a page claims more than its column")


def _struct_list(fields: ThriftFields, field: int) -> list[ThriftFields]:
    items: Any = fields.get(field, [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise _RejectedError("a footer of another form")
    return cast(list[ThriftFields], items)


def _count(fields: ThriftFields, field: int) -> int:
    value = fields.get(field)
    if type(value) is not int or value < 0:
        raise _RejectedError("a size or count is missing or below 0")
    return value
