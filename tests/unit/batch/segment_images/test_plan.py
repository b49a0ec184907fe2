"""Planning in whole units and little memory, and the index of completed images."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from loraseg.batch.segment_images.completed import read_completed
from loraseg.batch.segment_images.mask_names import key_id, text_digest
from loraseg.batch.segment_images.plan import plan_units
from loraseg.batch.segment_images.table import encode_rows
from loraseg.errors import IntegrityError
from loraseg.storage import LocalStore, ObjectInfo


@pytest.fixture
def output(tmp_path):
    return LocalStore(tmp_path / "out")


def listing(count):
    return (ObjectInfo(f"scene/{number:07}.jpg", 1000, None) for number in range(count))


def commit(output, unit):
    rows = [
        {"key": item.key, "id": key_id(item.key), "etag": "e", "status": "ok", "mask": item.mask}
        for item in unit.items
    ]
    output.put(unit.id, encode_rows(rows))


def test_units_are_cut_at_the_same_places_when_some_are_completed(output):
    all_units = list(plan_units(listing(103), read_completed(output), 10))
    assert [len(unit.items) for unit in all_units] == [10] * 10 + [3]
    completed = all_units[1], all_units[4], all_units[10]
    for unit in completed:
        commit(output, unit)
    assert list(plan_units(listing(103), read_completed(output), 10)) == [
        unit for unit in all_units if unit not in completed
    ]


def test_markers_of_folders_are_skipped(output):
    listed = [ObjectInfo("a/", 0, None), ObjectInfo("a/b.png", 9, None)]
    (unit,) = plan_units(listed, read_completed(output), 10)
    assert [item.key for item in unit.items] == ["a/b.png"]


def test_planning_needs_memory_for_one_unit(output):
    completed = read_completed(output)
    tracemalloc.start()
    count = sum(len(unit.items) for unit in plan_units(listing(5_000), completed, 32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5_000
    assert peak < 200_000


def test_the_index_finds_the_same_images_as_a_set(output):
    for unit in plan_units(listing(500), read_completed(output), 32):
        commit(output, unit)
    completed = read_completed(output)
    assert len(completed.ids) == 500
    for number in range(0, 1000, 7):
        key = f"scene/{number:07}.jpg"
        assert (text_digest(key) in completed) == (number < 500)
        assert completed.has_mask(f"masks/scene/{number:07}.png") == (number < 500)
    etag, file = completed.find_image(text_digest("scene/0000040.jpg"))
    assert etag == int.from_bytes(hashlib.sha256(b"e").digest()[:8], "big")
    assert file in completed.files


def test_both_halves_of_a_digest_are_compared(output):
    for unit in plan_units(listing(4), read_completed(output), 4):
        commit(output, unit)
    completed = read_completed(output)
    known = text_digest("scene/0000000.jpg")
    assert known in completed
    assert known[:8] + bytes(8) not in completed
    assert bytes(8) + known[8:] not in completed
    assert completed.ids.dtype == np.uint64


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not a table"])
def test_a_damaged_explanation_file_is_an_error(output, data):
    output.put("explanations/broken.parquet", data)
    with pytest.raises(IntegrityError, match=r"broken.parquet: not a table of explanations"):
        read_completed(output)
