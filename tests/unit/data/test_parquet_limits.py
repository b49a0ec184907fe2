"""Hostile Parquet files of every kind that loraseg reads: rejected, in little memory, no abort."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loraseg.batch.synthesize import plan
from loraseg.batch.synthesize.parquet_masks import ParquetMaskReader
from loraseg.data.masks import encode_mask
from loraseg.data.parquet_limits import ParquetLimits, open_checked_parquet
from loraseg.errors import DatasetError, IntegrityError, LorasegError
from loraseg.library import snapshot
from loraseg.library.snapshot import CATALOG_SCHEMA, decode_snapshot, encode_snapshot
from loraseg.storage import LocalStore
from tests.unit.library.test_snapshot import ENTRIES

LIMITS = ParquetLimits(group_rows=1000, list_values=10_000, column_bytes=2**20)


# Arrays may outlive a test, so their pools must.
POOLS = []


class OneFile(LocalStore):
    def __init__(self, data):
        super().__init__(Path("unused"))
        self.data = data

    def get(self, key):
        return self.data


def write(table, **options):
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def mask_file():
    cells = [encode_mask(np.full((4, 4), index, np.uint8)) for index in range(4)]
    return write(pa.table({"name": [f"{index}.png" for index in range(4)], "mask": cells}))


def plan_table(rows=4, name="n"):
    row = {"part": "ab" * 16, "mask_id": "cd" * 32, "name": name, "file": "f", "row": 0, "last": 3}
    return pa.Table.from_pylist([row] * rows, plan._PLAN_SCHEMA)


def read_masks(data):
    reader = ParquetMaskReader(OneFile(data))
    return [reader.mask("m.parquet", row) for row, _ in enumerate(reader.names("m.parquet"))]


FILES = {
    "masks": (mask_file, read_masks),
    "plan": (
        lambda: write(plan_table(), compression="zstd"),
        lambda data: plan.decode_plan(data, "x", plan.PlanHistory()),
    ),
    "catalog": (lambda: encode_snapshot(ENTRIES), lambda data: decode_snapshot(data, "x")),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_changed_bit_of_the_footer_is_an_error_or_harmless(kind):
    """Among them: a column that becomes required, which aborts pyarrow's own metadata reader."""
    make, read = FILES[kind]
    data = make()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    step = max(1, (len(data) - footer) // 150)
    rejected = 0
    for index, offset in enumerate(range(footer, len(data), step)):
        changed = bytearray(data)
        changed[offset] ^= 1 << index % 8
        try:
            read(bytes(changed))
        except LorasegError:
            rejected += 1
    assert rejected > 40


def peak_memory_of_rejection(read, data, match):
    """Return the largest size of pyarrow's memory pool while a file is rejected."""
    usual = pa.default_memory_pool()
    POOLS.append(pa.proxy_memory_pool(usual))
    pa.set_memory_pool(POOLS[-1])
    try:
        with pytest.raises(IntegrityError, match=match):
            read(data)
    finally:
        pa.set_memory_pool(usual)
    return POOLS[-1].max_memory()


BOMBS = {
    "dictionary": {"use_dictionary": True, "dictionary_pagesize_limit": 10**7},
    "zstd": {"use_dictionary": False, "compression": "zstd"},
    "prefixes": {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_catalog_that_expands_is_rejected(kind, monkeypatch):
    monkeypatch.setattr(snapshot, "_LIMITS", replace(snapshot._LIMITS, column_bytes=2**20))
    table = pq.read_table(io.BytesIO(encode_snapshot(ENTRIES[:1] * 100)))
    index = CATALOG_SCHEMA.get_field_index("role")
    table = table.set_column(index, CATALOG_SCHEMA.field("role"), pa.array(["x" * 2**18] * 100))
    options = dict(BOMBS[kind])
    if "column_encoding" in options:
        options["column_encoding"] = {"role": "DELTA_BYTE_ARRAY"}
    data = write(table, **options)
    assert len(data) < 2**20
    match = "'role' expands to more than 1 MiB"
    read = FILES["catalog"][1]
    assert peak_memory_of_rejection(read, data, match) < 4 * 2**20


def test_a_plan_that_expands_is_rejected(monkeypatch):
    data = write(plan_table(100, "x" * 2**18), dictionary_pagesize_limit=10**7)
    monkeypatch.setattr(plan, "_LIMITS", replace(plan._LIMITS, column_bytes=2**20))
    match = "'name' expands to more than 1 MiB"
    assert peak_memory_of_rejection(FILES["plan"][1], data, match) < 4 * 2**20


def test_batches_are_small_if_values_may_be_repeated():
    columns = {"a": ["x" * 2**19, *"abcdef"], "b": list(range(7))}
    file = open_checked_parquet(write(pa.table(columns)), "x", LIMITS)
    batches = list(file.batches(0, ["a", "b"]))
    assert [batch.num_rows for batch in batches] == [1] * 7
    assert pa.Table.from_batches(batches).to_pydict() == columns
    (one,) = file.batches(0, ["b"])
    assert one.num_rows == 7


@pytest.mark.parametrize("error", [IntegrityError, DatasetError])
def test_limits_and_schemas(error):
    table = pa.table({"a": pa.array(range(1001), pa.int64()), "b": [[0.5] * 20] * 1001})

    def read(table, limits=LIMITS, schema=None):
        file = open_checked_parquet(write(table), "x", limits, schema=schema, error=error)
        return [
            batch for group in range(len(file.group_rows)) for batch in file.batches(group, "b")
        ]

    with pytest.raises(error, match="x: a row group of 1001 rows"):
        read(table)
    with pytest.raises(error, match=r"x: row group 0: b.*: 20020 values in 1001 rows"):
        read(table, replace(LIMITS, group_rows=2000))
    assert sum(batch.num_rows for batch in read(table[:400])) == 400
    with pytest.raises(error, match="x: lacks column c"):
        read(table[:1], schema=pa.schema([("c", pa.int64())]))
    with pytest.raises(error, match="x: column a has another type"):
        read(table[:1], schema=pa.schema([("a", pa.int32())]))
    with pytest.raises(error, match="x: not a Parquet file"):
        open_checked_parquet(b"PAR1", "x", LIMITS, error=error)


def test_the_arrow_schema_in_the_metadata_must_agree():
    labels = pa.DictionaryArray.from_arrays(pa.array([0, 0]), pa.array(["x"]))
    data = write(pa.table({"a": labels}))
    with pytest.raises(IntegrityError, match="x: column a has type dictionary"):
        open_checked_parquet(data, "x", LIMITS, schema=pa.schema([("a", pa.string())]))
