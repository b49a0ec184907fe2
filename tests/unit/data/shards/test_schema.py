import io
import json
import struct
from dataclasses import astuple, replace
from hashlib import sha256

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loraseg.data.shards import schema
from loraseg.data.shards.schema import (
    SHARD_SCHEMA,
    decode_shard,
    encode_shard,
    read_rows,
    rows_digest,
)
from loraseg.data.thrift import CompactReader
from loraseg.errors import DatasetError, IntegrityError
from tests.unit.data.shards.sample_dataset import CLASSES, make_bad_mask, make_dropped, make_pair

ROWS = [*map(make_pair, range(150)), make_dropped(200), make_bad_mask("broken.png")]


def column_values(name):
    return [getattr(row, name) for row in ROWS]


def test_rows_come_back_in_their_order():
    data = encode_shard(ROWS, CLASSES)
    assert list(map(astuple, decode_shard(data, "x"))) == list(map(astuple, ROWS))
    assert len(list(read_rows(data, "x", columns=(), classes=CLASSES))) == len(ROWS)
    with pytest.raises(IntegrityError, match="classes are not those"):
        next(read_rows(data, "x", classes=CLASSES[:1]))
    assert decode_shard(encode_shard([], CLASSES), "x") == []


def test_equal_rows_give_equal_bytes():
    again = [replace(row, image=row.image and bytes(bytearray(row.image))) for row in ROWS]
    assert encode_shard(ROWS, CLASSES) == encode_shard(again, list(CLASSES))
    assert encode_shard(ROWS[1:], CLASSES) != encode_shard(ROWS, CLASSES)


def test_row_groups_are_small(monkeypatch):
    metadata = pq.read_metadata(io.BytesIO(encode_shard(ROWS, CLASSES)))
    sizes = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    assert sizes == [64, 64, 24]
    monkeypatch.setattr(schema, "_GROUP_BYTES", 64 * 2**10)
    large = [make_pair(n, image=bytes(30 * 2**10)) for n in range(5)]
    metadata = pq.read_metadata(io.BytesIO(encode_shard(large, CLASSES)))
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [3, 2]


def test_shards_are_readable_with_pyarrow():
    table = pq.read_table(io.BytesIO(encode_shard(ROWS, CLASSES)))
    for name in ("pair_id", "status", "image", "label", "k", "seed", "kept", "lineage"):
        assert table.column(name).to_pylist() == column_values(name)
    first = table.column("adapters")[0].as_py()
    assert first[0] == {"name": "fog", "digest": "cd" * 32, "weight": 0.75}
    metadata = pq.read_metadata(io.BytesIO(encode_shard(ROWS, CLASSES))).metadata
    assert json.loads(metadata[b"loraseg"]) == {"format": 1, "classes": list(CLASSES)}
    plain = {pa.string(), pa.binary(), pa.int32(), pa.int64(), pa.float64()}
    assert {field.type for field in SHARD_SCHEMA if not pa.types.is_nested(field.type)} <= plain


def test_shards_are_readable_with_pandas():
    frame = pandas.read_parquet(io.BytesIO(encode_shard(ROWS, CLASSES)))
    ok = frame[frame.status == "ok"]
    assert list(ok.pair_id) == [row.pair_id for row in ROWS if row.status == "ok"]
    assert list(ok.image) == [row.image for row in ROWS if row.status == "ok"]
    assert ok.kept.mean() == pytest.approx(0.75)
    assert list(ok.kept_by_class[0][[0, 2]]) == [0.5, 1.0]


def test_shards_are_readable_with_duckdb(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    path = tmp_path / "shard.parquet"
    path.write_bytes(encode_shard(ROWS, CLASSES))
    query = f"select pair_id, image, adapters[1].weight from '{path}' where status = 'ok'"
    assert duckdb.sql(query).fetchall() == [
        (row.pair_id, row.image, 0.75) for row in ROWS if row.status == "ok"
    ]


def test_digest_is_of_rows_in_any_order_by_any_code():
    expected = rows_digest(ROWS)
    assert rows_digest(reversed(ROWS)) == expected
    other = [
        replace(
            row,
            code_revision="r2",
            lineage=row.lineage and json.dumps({**json.loads(row.lineage), "code_revision": "r2"}),
        )
        for row in ROWS
    ]
    assert rows_digest(other) == expected
    assert rows_digest(decode_shard(encode_shard(ROWS, CLASSES), "x")) == expected
    assert rows_digest([]) == sha256(b"rows").hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"image": b"other"},
        {"label": b"other"},
        {"predicted": b"other"},
        {"kept": 0.7500000000000001},
        {"kept_by_class": (0.5, 0.0, 1.0)},
        {"adapters": ()},
        {"mask_name": "other"},
        {"lineage": '{"pair_id": "other"}'},
        {"lineage": "no json"},
        {"status": "dropped", "reason": "why"},
        {"pair_id": "00"},
        {"seed": None},
    ],
)
def test_digest_notices_every_change(change):
    few = ROWS[:3]
    assert rows_digest([replace(few[0], **change), *few[1:]]) != rows_digest(few)


def test_digest_notices_doubles():
    assert rows_digest([*ROWS, ROWS[0]]) != rows_digest(ROWS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"status": "fine"}, "status: got 'fine'"),
        ({"pair_id": "../../x"}, "pair_id: got"),
        ({"pair_id": None}, "pair_id: missing"),
        ({"image": None, "label": None}, "image, label: missing"),
        ({"reason": "but"}, "reason: got 'but'"),
        ({"status": "dropped"}, "reason: got None"),
        ({"mask_name": "a\nb"}, "mask_name"),
        ({"mask_name": "x" * 1025}, "mask_name"),
        ({"height": 0}, "height x width"),
        ({"height": 2**30, "width": 2**30}, "height x width"),
        ({"k": -1}, "below 0"),
        ({"k": 2**40}, "cannot hold"),
        ({"kept": 1.5}, "a share outside"),
        ({"kept": float("nan")}, "a share outside"),
        ({"kept_by_class": (1.0,)}, "1 values for 3 classes"),
        ({"heads": (("a", "b", float("inf")),)}, "not finite"),
        ({"prompt": "\ud800"}, "cannot hold"),
    ],
)
def test_rows_that_break_the_rules_are_not_written(change, match):
    row = make_pair(0)
    for name, value in change.items():
        object.__setattr__(row, name, value)  # as a caller without type checks might
    with pytest.raises(DatasetError, match=match):
        encode_shard([row], CLASSES)


def test_two_pairs_of_one_id_are_not_written():
    with pytest.raises(DatasetError, match="there twice"):
        encode_shard([make_pair(0), make_pair(0)], CLASSES)


@pytest.mark.parametrize("classes", [(), ("a", "a"), ("a", " "), ("a\n",), ["c"] * 65_536])
def test_class_lists_that_break_the_rules_are_not_written(classes):
    with pytest.raises(DatasetError, match="classes: "):
        encode_shard([], classes)


def plain(**changes):
    """Return columns of two good rows as a stranger's Parquet library takes them."""
    table = pq.read_table(io.BytesIO(encode_shard([make_pair(0), make_pair(1)], CLASSES)))
    columns = {name: table.column(name) for name in table.column_names}
    return pa.table({**columns, **changes})


ABOUT = json.dumps({"format": 1, "classes": CLASSES})


def file_of(table, about=ABOUT, **options):
    buffer = io.BytesIO()
    usual = {"compression": "none", "use_dictionary": False, "store_schema": False}
    with pq.ParquetWriter(buffer, table.schema, **{**usual, **options}) as writer:
        if about is not None:
            writer.add_key_value_metadata({"loraseg": about})
        writer.write_table(table)
    return buffer.getvalue()


OTHER_LAYOUTS = {
    "plain": lambda: file_of(plain()),
    "dictionaries": lambda: file_of(plain(), use_dictionary=["image"]),
    "snappy": lambda: file_of(plain(), compression="snappy"),
    "delta": lambda: file_of(plain(), column_encoding={"prompt": "DELTA_BYTE_ARRAY"}),
    "version 2 pages": lambda: file_of(plain(), data_page_version="2.0"),
    "columns turned around": lambda: file_of(plain().select(SHARD_SCHEMA.names[::-1])),
    "a schema of Arrow": lambda: file_of(plain(), store_schema=True),
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_rows_of_other_writers_are_read(layout):
    rows = decode_shard(OTHER_LAYOUTS[layout](), "x")
    assert list(map(astuple, rows)) == [astuple(make_pair(n)) for n in range(2)]


HOSTILE = {
    "nothing": lambda: b"",
    "no parquet": lambda: b"PAR1" + bytes(100) + b"PAR1",
    "a column less": lambda: file_of(plain().drop_columns(["label"])),
    "text for a number": lambda: file_of(plain(k=pa.array(["0", "1"]))),
    "number for an image": lambda: file_of(plain(image=pa.array([1, 2]))),
    "no metadata": lambda: file_of(plain(), about=None),
    "metadata no json": lambda: file_of(plain(), about="{"),
    "deep metadata": lambda: file_of(plain(), about="[" * 10**5),
    "other format": lambda: file_of(plain(), about='{"format": 2, "classes": ["a"]}'),
    "classes no text": lambda: file_of(plain(), about='{"format": 1, "classes": [[1]]}'),
    "no classes": lambda: file_of(plain(), about='{"format": 1, "classes": null}'),
    "null status": lambda: file_of(plain(status=pa.array([None, "ok"], pa.string()))),
    "other status": lambda: file_of(plain(status=pa.array(["fine", "ok"]))),
    "null name": lambda: file_of(plain(mask_name=pa.array([None, "x"], pa.string()))),
    "id that leaves": lambda: file_of(plain(pair_id=pa.array(["../x", "ab"]))),
    "not utf-8": lambda: file_of(plain(prompt=pa.array([b"\xff", b"\xfe"]).view(pa.string()))),
    "null adapter": lambda: file_of(
        plain(adapters=pa.array([[None], []], SHARD_SCHEMA.field("adapters").type))
    ),
    "null weight": lambda: file_of(
        plain(
            heads=pa.array([[{"name": "a", "digest": "b"}], []], SHARD_SCHEMA.field("heads").type)
        )
    ),
    "many rows": lambda: file_of(pa.concat_tables([plain()] * 33)),
    "a column more": lambda: file_of(plain(more=pa.array([1, 2]))),
    "nullable no more": lambda: file_of(
        plain().cast(
            pa.schema([pa.field(f.name, f.type, f.name != "status") for f in SHARD_SCHEMA])
        )
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_rejected(what):
    data = HOSTILE[what]()
    with pytest.raises(IntegrityError, match="where"):
        decode_shard(data, "where")


def limit_column_bytes(monkeypatch):
    limits = replace(schema._LIMITS, column_bytes=2**20)
    monkeypatch.setattr(schema, "_LIMITS", limits)


def test_columns_that_expand_are_rejected(monkeypatch):
    limit_column_bytes(monkeypatch)
    bomb = pa.array(["x" * 2**20, ""])
    with pytest.raises(IntegrityError, match="'lineage' expands to more than 1 MiB"):
        decode_shard(file_of(plain(lineage=bomb), compression={"lineage": "zstd"}), "x")
    run = pa.ListArray.from_arrays(pa.array([0, 2**22, 2**22 + 1], pa.int32()), pa.nulls(2**22 + 1))
    data = file_of(plain(kept_by_class=run.cast(pa.list_(pa.float64()))))
    assert len(data) < 2**20
    with pytest.raises(IntegrityError, match=r"kept_by_class.* values in 2 rows"):
        decode_shard(data, "x")


def test_an_image_repeated_by_a_dictionary_counts_every_time(monkeypatch):
    limit_column_bytes(monkeypatch)
    same = pa.array([b"x" * 600_000] * 2)
    with pytest.raises(IntegrityError, match="'image' expands to more than 1 MiB"):
        decode_shard(file_of(plain(image=same), use_dictionary=["image"]), "x")


def pages(data):
    """Yield the name of each column chunk, and start and end of its first page header."""
    metadata = pq.read_metadata(io.BytesIO(data))
    for place in range(metadata.num_columns):
        column = metadata.row_group(0).column(place)
        start = column.data_page_offset
        reader = CompactReader(data, start, start + column.total_compressed_size)
        reader.read_struct()
        yield column.path_in_schema, start, reader.offset


def zigzag(value):
    value *= 2
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("field", ["unfolded", "stored", "values"])
def test_page_headers_that_exceed_the_footer_are_rejected(field):
    # Lists of 4,096 numbers give the sizes two or more bytes, so that larger ones fit in place.
    lists = pa.array([[0.5] * 4096] * 2, pa.list_(pa.float64()))
    data = file_of(plain(kept_by_class=lists), write_statistics=False)
    _, start, end = next(p for p in pages(data) if p[0].startswith("kept_by_class"))
    header = data[start:end]
    numbers = {"unfolded": header[3:6], "stored": header[7:10]}
    value = zigzag(8192) if field == "values" else numbers[field]
    assert value in header
    larger = bytes([*value[:-1], 0x7F])
    place = start + header.index(value, 7 if field == "stored" else 0)
    forged = data[:place] + larger + data[place + len(larger) :]
    with pytest.raises(IntegrityError, match=r"claims more than|cut off|beyond the file"):
        decode_shard(forged, "x")


def test_any_changed_byte_gives_rows_or_an_integrity_error():
    data = encode_shard([make_pair(0), make_bad_mask("x")], CLASSES)
    draw = np.random.default_rng(0)
    for _ in range(20):
        broken = bytearray(data)
        for _ in range(int(draw.integers(1, 4))):
            # Half of the hits into the footer, where the sizes are.
            low = len(data) // 2 if draw.random() < 0.5 else 0
            broken[draw.integers(low, len(data))] = draw.integers(256)
        try:
            decode_shard(bytes(broken), "x")
        except IntegrityError:
            continue
    for cut in draw.integers(0, len(data), 8):
        with pytest.raises(IntegrityError):
            decode_shard(data[: int(cut)], "x")


def test_the_footer_size_is_checked():
    data = bytearray(encode_shard([make_pair(0)], CLASSES))
    data[-8:-4] = struct.pack("<I", 2**31 - 1)
    with pytest.raises(IntegrityError, match="a footer of 2147483647 bytes"):
        decode_shard(bytes(data), "x")


def test_rows_are_read_group_by_group():
    rows = read_rows(encode_shard(ROWS, CLASSES), "x", columns=("k",))
    first = next(rows)
    assert (first.k, first.image, first.kept_by_class) == (0, None, ())
    assert len(list(rows)) == len(ROWS) - 1
