"""Parquet files from untrusted sources, read with a bound on memory known in advance.

Every Parquet file that loraseg reads (shards, plans, masks, catalog snapshots) is opened here.
pyarrow's own metadata cannot bound the memory: it trusts the sizes that page headers claim, run
lengths and dictionaries let a few hundred bytes decode to gigabytes, and some contradictory
footers end the process (pyarrow 26 aborts if a row group lacks a column, or in
``ColumnChunkMetaData`` if level histograms do not fit the schema). So the footer and the header of
every page are parsed here and compared with each other and with fixed limits before pyarrow
decodes a page. Field numbers are those of parquet-format's parquet.thrift.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from loraseg.data.thrift import CompactReader, ThriftError
from loraseg.errors import IntegrityError, LorasegError

__all__ = ["CheckedParquet", "ParquetLimits", "open_checked_parquet"]

_MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 16 * 2**20
_BYTE_ARRAYS = (6, 7)  # physical types whose dictionaries and prefixes multiply
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_PAGE_FIELDS = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}
_PLAIN = 0
_REPEATED = 2
_PYARROW_ERRORS = (
    pa.ArrowException,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
)

ThriftFields = dict[int, Any]


@dataclass(frozen=True, slots=True)
class ParquetLimits:
    """Bounds on what a file may contain.

    Attributes:
        group_rows: Rows of a row group.
        list_values: Values of a list column in a row group.
        column_bytes: Size of one column in a row group: as decompressed pages, and decoded.
    """

    group_rows: int
    list_values: int = 2**22
    column_bytes: int = 256 * 2**20


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A column of the file: physical type, path in the schema, whether it is inside a list."""

    kind: int
    path: tuple[bytes, ...]
    repeated: bool

    @property
    def name(self) -> str:
        return b".".join(self.path).decode(errors="replace")


class _RejectedError(Exception):
    """The reason why a file is not read."""


@dataclass(frozen=True, slots=True, eq=False)
class CheckedParquet:
    """An open file whose row groups fit the footer; made by :func:`open_checked_parquet`.

    Attributes:
        where: Name of the file, for messages.
        group_rows: Number of rows of each row group.
        metadata: The key-value metadata of the footer.
        schema: The columns as pyarrow sees them.
    """

    where: str
    group_rows: tuple[int, ...]
    metadata: dict[bytes, bytes]
    schema: pa.Schema
    _data: bytes
    _file: pq.ParquetFile
    _leaves: tuple[_Leaf, ...]
    _groups: tuple[list[ThriftFields], ...]
    _limits: ParquetLimits
    _error: type[LorasegError]

    def has_column(self, path: str) -> bool:
        """Return whether the file has a column of this dotted path with one value per row."""
        return any(leaf.name == path and not leaf.repeated for leaf in self._leaves)

    def check_column(self, group: int, column: str) -> None:
        """Check the page headers of a column without decoding it.

        Raises:
            LorasegError: Of the class given to :func:`open_checked_parquet`: a header is
                inconsistent, or the pages decompress to more than the limit.
        """
        try:
            self._largest_values(group, column)
        except (_RejectedError, ThriftError) as error:
            raise self._error(f"{self.where}: row group {group}: {error}") from error

    def batches(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a row group in batches; no more than ``column_bytes`` are decoded.

        Args:
            group: Index of the row group.
            columns: Names of columns, or dotted paths.

        Raises:
            LorasegError: Of the class given to :func:`open_checked_parquet`: a column is damaged
                or decodes to more than the limit.
        """
        try:
            yield from self._decode(group, columns)
        except (_RejectedError, ThriftError) as error:
            raise self._error(f"{self.where}: row group {group}: {error}") from error
        except _PYARROW_ERRORS as error:
            if isinstance(error, LorasegError):
                raise
            raise self._error(f"{self.where}: row group {group} cannot be read: {error}") from error

    def _decode(self, group: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        rows, limit = self.group_rows[group], self._limits.column_bytes
        # A dictionary or a shared prefix multiplies a value, at most once per row.
        value_bytes = sum(self._largest_values(group, column) for column in columns)
        size = rows if rows * value_bytes <= limit else max(1, limit // (4 * value_bytes))
        decoded = dict.fromkeys(columns, 0)
        count = 0
        for batch in self._file.iter_batches(
            max(1, size), row_groups=[group], columns=list(columns), use_threads=False
        ):
            count += batch.num_rows
            for column, array in zip(batch.schema.names, batch.columns, strict=True):
                name = column if column in decoded else columns[0]
                decoded[name] += array.nbytes
                if decoded[name] > limit:
                    raise _RejectedError(_too_large(name, limit))
            yield batch
        if count != rows:
            raise _RejectedError(f"got {count} rows, expected {rows}")

    def _largest_values(self, group: int, column: str) -> int:
        """Check a column's pages; return a bound on a value that may be stored less than once."""
        chunks = zip(self._leaves, self._groups[group], strict=True)
        return sum(
            _check_pages(self._data, leaf, chunk, self.group_rows[group], self._limits)
            for leaf, chunk in chunks
            if leaf.name == column or leaf.name.startswith(f"{column}.")
        )


def open_checked_parquet(
    data: bytes,
    where: str,
    limits: ParquetLimits,
    *,
    schema: pa.Schema | None = None,
    error: type[LorasegError] = IntegrityError,
) -> CheckedParquet:
    """Open a file from an untrusted source.

    Args:
        data: The file.
        where: Name of the file, for messages.
        limits: Bounds on its content.
        schema: Columns that the file must have with these types; others are allowed.
        error: The class to raise.

    Raises:
        LorasegError: Of class ``error``: the file is not Parquet, its footer is inconsistent, or
            it lacks a column of ``schema``.
    """
    try:
        footer = _read_footer(data)
        elements = _struct_list(footer, 2)
        if schema is not None:
            _check_schema(elements, schema)
        leaves = tuple(_leaves(elements))
        groups = [_check_group(group, leaves, limits) for group in _struct_list(footer, 4)]
        rows = tuple(rows for rows, _ in groups)
        if footer.get(3) != sum(rows) or 8 in footer:
            raise _RejectedError(f"{footer.get(3)} rows, but its groups have {sum(rows)}")
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        arrow_schema = file.schema_arrow
        for field in schema or ():
            # An Arrow schema in the metadata takes precedence over the file's own.
            if (kind := arrow_schema.field(field.name).type) != field.type:
                raise _RejectedError(f"column {field.name} has type {kind}")
        return CheckedParquet(
            where,
            rows,
            dict(file.metadata.metadata or {}),
            arrow_schema,
            data,
            file,
            leaves,
            tuple(chunks for _, chunks in groups),
            limits,
            error,
        )
    except _RejectedError as cause:
        raise error(f"{where}: {cause}") from cause
    except (ThriftError, *_PYARROW_ERRORS) as cause:
        raise error(f"{where}: not a readable Parquet file: {cause}") from cause


def _read_footer(data: bytes) -> ThriftFields:
    size = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC:
        raise _RejectedError("not a Parquet file")
    if size > min(len(data) - 12, _MAX_FOOTER_BYTES):
        raise _RejectedError(f"a footer of {size} bytes in a file of {len(data)}")
    return CompactReader(data, len(data) - 8 - size, len(data) - 8).read_struct()


def _leaves(elements: Sequence[ThriftFields]) -> Iterator[_Leaf]:
    """Yield the columns of a schema, which is a tree in depth-first order."""
    stack: list[tuple[int, tuple[bytes, ...], bool]] = []  # children left, path, in a list
    for index, element in enumerate(elements):
        children, name = element.get(5, 0), element.get(4)
        if not isinstance(name, bytes) or type(children) is not int or children < 0:
            raise _RejectedError("a schema of another form")
        path, repeated = (), False
        if index:
            if not stack:
                raise _RejectedError("a schema of another form")
            left, path, repeated = stack.pop()
            if left > 1:
                stack.append((left - 1, path, repeated))
            path, repeated = (*path, name), repeated or element.get(3) == _REPEATED
        if children:
            stack.append((children, path, repeated))
        elif index:
            yield _Leaf(_count(element, 1), path, repeated)
    if stack:
        raise _RejectedError("a schema of another form")


def _check_schema(elements: Sequence[ThriftFields], schema: pa.Schema) -> None:
    actual = _columns(elements)
    if missing := [name for name in schema.names if name.encode() not in actual]:
        raise _RejectedError(f"lacks column {', '.join(missing)}")
    for name, expected in _expected_columns(schema).items():
        if actual[name] != expected:
            raise _RejectedError(f"column {name.decode()} has another type")


@functools.cache
def _expected_columns(schema: pa.Schema) -> dict[bytes, list[ThriftFields]]:
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema, store_schema=False).close()
    return _columns(_struct_list(_read_footer(sink.getvalue().to_pybytes()), 2))


def _columns(elements: Sequence[ThriftFields]) -> dict[bytes, list[ThriftFields]]:
    """Return, by column, the type, repetition, name, children and converted type of its nodes."""
    columns: dict[bytes, list[ThriftFields]] = {}
    nodes: list[ThriftFields] = []
    left = 0
    for element in elements[1:]:
        if not left:
            nodes = []
            columns[element.get(4, b"")] = nodes
            left = 1
        nodes.append({key: element[key] for key in (1, 3, 4, 5, 6) if key in element})
        left += element.get(5, 0) - 1
    return columns


def _check_group(
    group: ThriftFields, leaves: Sequence[_Leaf], limits: ParquetLimits
) -> tuple[int, list[ThriftFields]]:
    """Return the number of rows of a row group and the metadata of its columns."""
    rows, chunks = _count(group, 3), _struct_list(group, 1)
    if rows > limits.group_rows or len(chunks) != len(leaves):
        raise _RejectedError(f"a row group of {rows} rows and {len(chunks)} columns")
    columns: list[ThriftFields] = []
    for chunk, leaf in zip(chunks, leaves, strict=True):
        column = chunk.get(3)
        if not isinstance(column, dict) or set(chunk) & {1, 8, 9}:
            raise _RejectedError("a column in another file, or an encrypted one")
        fields = cast(ThriftFields, column)
        if fields.get(1) != leaf.kind or fields.get(3) != list(leaf.path):
            raise _RejectedError(f"{leaf.name}: a row group has another column in its place")
        columns.append(fields)
    return rows, columns


def _check_pages(
    data: bytes, leaf: _Leaf, column: ThriftFields, rows: int, limits: ParquetLimits
) -> int:
    """Check the sizes of a column in a row group against its page headers.

    Returns:
        The size of the largest page, a bound on each value, if pages may store a value once and
        repeat it; 0 if every value is stored in full.
    """
    # An empty list or a null counts as one value.
    values = _count(column, 5)
    if values != rows and not (leaf.repeated and values <= limits.list_values):
        raise _RejectedError(f"{leaf.name}: {values} values in {rows} rows")
    claimed, stored, start = (_count(column, field) for field in (6, 7, 9))
    if not stored and not values:  # a row group without rows
        return 0
    if 11 in column:  # a dictionary page, if it precedes the data
        start = min(start, _count(column, 11) or start)
    if start < len(_MAGIC) or start + stored > len(data):
        raise _RejectedError(f"{leaf.name}: its pages are beyond the file")
    reader = CompactReader(data, start, start + stored)
    total = largest = 0
    multiplies = False
    while reader.offset < reader.stop:
        header = reader.read_struct()
        size = _count(header, 2)
        page_values, encoding = _page_values(header, leaf)
        total, largest, values = total + size, max(largest, size), values - page_values
        multiplies |= encoding != _PLAIN
        reader.skip(_count(header, 3))
        if total > limits.column_bytes:
            raise _RejectedError(_too_large(leaf.name, limits.column_bytes))
        if total > claimed or values < 0:
            raise _RejectedError(f"{leaf.name}: a page claims more than its column")
    if values:
        raise _RejectedError(f"{leaf.name}: its pages lack {values} values")
    return largest if multiplies and leaf.kind in _BYTE_ARRAYS else 0


def _page_values(header: ThriftFields, leaf: _Leaf) -> tuple[int, int]:
    """Return the number of values and the encoding of a page; 0 values for a dictionary."""
    kind = _count(header, 1)
    fields = header.get(_PAGE_FIELDS.get(kind, 0))
    if not isinstance(fields, dict):
        raise _RejectedError(f"{leaf.name}: a page that is neither data nor a dictionary")
    page = cast(ThriftFields, fields)
    if kind == _DICTIONARY_PAGE:
        return 0, _PLAIN
    return _count(page, 1), _count(page, 2 if kind == _DATA_PAGE else 4)


def _too_large(column: str, limit: int) -> str:
    return (
        f"column {column!r} expands to more than {limit / 2**20:g} MiB; write the file in smaller "
        "row groups"
    )


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
