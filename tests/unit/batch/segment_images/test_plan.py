"""What is left to do: whole parts, in little memory; and the ledger that says what is done."""

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


def commit(output, part):
    rows = [
        {"key": item.key, "id": key_id(item.key), "etag": "e", "status": "ok", "mask": item.mask}
        for item in part.items
    ]
    output.put(part.id, encode_rows(rows))


def test_parts_are_cut_at_the_same_places_whatever_is_done(output):
    whole = list(plan_units(listing(103), read_completed(output), 10))
    assert [len(part.items) for part in whole] == [10] * 10 + [3]
    done = whole[1], whole[4], whole[10]
    for part in done:
        commit(output, part)
    assert list(plan_units(listing(103), read_completed(output), 10)) == [
        p for p in whole if p not in done
    ]


def test_markers_of_folders_are_no_images(output):
    marked = [ObjectInfo("a/", 0, None), ObjectInfo("a/b.png", 9, None)]
    (part,) = plan_units(marked, read_completed(output), 10)
    assert [item.key for item in part.items] == ["a/b.png"]


def test_planning_needs_memory_for_one_part(output):
    ledger = read_completed(output)
    tracemalloc.start()
    count = sum(len(part.items) for part in plan_units(listing(5_000), ledger, 32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5_000
    assert peak < 200_000


def test_the_ledger_finds_what_a_set_would(output):
    for part in plan_units(listing(500), read_completed(output), 32):
        commit(output, part)
    ledger = read_completed(output)
    assert len(ledger.ids) == 500
    for number in range(0, 1000, 7):
        key = f"scene/{number:07}.jpg"
        assert (text_digest(key) in ledger) == (number < 500)
        assert ledger.has_mask(f"masks/scene/{number:07}.png") == (number < 500)
    etag, file = ledger.find_image(text_digest("scene/0000040.jpg"))
    assert etag == int.from_bytes(hashlib.sha256(b"e").digest()[:8], "big")
    assert file in ledger.files


def test_half_of_a_digest_in_common_is_not_enough(output):
    for part in plan_units(listing(4), read_completed(output), 4):
        commit(output, part)
    ledger = read_completed(output)
    known = text_digest("scene/0000000.jpg")
    assert known in ledger
    assert known[:8] + bytes(8) not in ledger
    assert bytes(8) + known[8:] not in ledger
    assert ledger.ids.dtype == np.uint64


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no table"])
def test_a_damaged_explanation_file_is_named(output, data):
    output.put("explanations/broken.parquet", data)
    with pytest.raises(IntegrityError, match=r"broken.parquet: not a table of explanations"):
        read_completed(output)
