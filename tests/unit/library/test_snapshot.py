import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loraseg.errors import IntegrityError
from loraseg.library.snapshot import CATALOG_SCHEMA, CatalogEntry, decode_snapshot, encode_snapshot
from tests.unit.library.sample_adapters import make_card, make_centroid


def entry(name, version=1, **fields):
    return CatalogEntry(version, "d" * 64, make_card(name, **fields), True, "e" * 64, 7)


ENTRIES = (
    entry("a"),
    entry("a", 2, centroids=()),
    entry("b", centroids=[make_centroid((1.5,)), make_centroid((1.0, 2.0, 3.0), encoder_id="x")]),
)


@pytest.mark.parametrize("entries", [(), ENTRIES[:1], ENTRIES[1:2], ENTRIES])
def test_round_trip(entries):
    assert decode_snapshot(encode_snapshot(reversed(entries)), "here") == tuple(entries)


def test_same_entries_same_bytes():
    assert encode_snapshot(ENTRIES) == encode_snapshot(reversed(ENTRIES))


def test_cached_entries_are_reused_except_for_current():
    data = encode_snapshot([replace(ENTRIES[0], current=False), *ENTRIES[1:]])
    found = decode_snapshot(data, "here", ENTRIES[:2])
    assert found == (replace(ENTRIES[0], current=False), *ENTRIES[1:])
    assert found[1] is ENTRIES[1]
    other = replace(ENTRIES[1], record_digest="f" * 64, card=make_card("a", code_revision="x"))
    assert decode_snapshot(data, "here", [other])[1] == ENTRIES[1]


def test_other_readers_find_plain_columns():
    table = pq.read_table(io.BytesIO(encode_snapshot(ENTRIES)))
    rows = table.to_pylist()
    assert [(row["name"], row["version"], row["count"]) for row in rows] == [
        ("a", 1, 12),
        ("a", 2, 12),
        ("b", 1, 12),
    ]
    assert rows[2]["centroids"][1]["vector"] == [1.0, 2.0, 3.0]
    assert rows[0]["base_digest"] == "b" * 64


def rewrite_snapshot(change):
    table = pq.read_table(io.BytesIO(encode_snapshot(ENTRIES)))
    buffer = io.BytesIO()
    pq.write_table(change(table), buffer)
    return buffer.getvalue()


def test_unknown_columns_are_ignored():
    data = rewrite_snapshot(lambda t: t.append_column("new", pa.array([1, 2, 3])))
    assert decode_snapshot(data, "here") == ENTRIES


def replace_column(name, values):
    index = CATALOG_SCHEMA.get_field_index(name)
    return lambda t: t.set_column(
        index, CATALOG_SCHEMA.field(name), pa.array(values, CATALOG_SCHEMA.types[index])
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        encode_snapshot(ENTRIES)[:-9],
        rewrite_snapshot(lambda t: t.replace_schema_metadata({b"format": b"loraseg-catalog-2"})),
        rewrite_snapshot(lambda t: t.drop_columns(["card"])),
        rewrite_snapshot(replace_column("card", ["{}", "[]", "x"])),
        rewrite_snapshot(replace_column("name", ["a", "../up", "b"])),
        rewrite_snapshot(replace_column("digest", ["d", "d", "d"])),
        rewrite_snapshot(replace_column("version", [0, 1, 2])),
    ],
)
def test_damage_is_an_error_with_the_file_name(data):
    with pytest.raises(IntegrityError, match="here: "):
        decode_snapshot(data, "here")


def test_vectors_are_exact():
    vector = np.random.default_rng(0).normal(size=768)
    (found,) = decode_snapshot(
        encode_snapshot([entry("a", centroids=[make_centroid(vector)])]), "here"
    )
    assert found.card.centroids[0].vector.tobytes() == vector.tobytes()
