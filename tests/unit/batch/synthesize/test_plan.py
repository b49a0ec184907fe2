"""Scanning conditions and cutting them into units; plans as files."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loraseg.batch.synthesize.conditions import ConditionRef, ScannedCondition
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.batch.synthesize.plan import (
    PlanHistory,
    decode_plan,
    encode_plan,
    plan_units,
    scan_conditions,
)
from loraseg.data.masks import encode_mask
from loraseg.errors import ConfigError, DatasetError, IntegrityError
from loraseg.synth.lineage import mask_digest
from tests.tiny_synthesis import CLASSES, mask, write_masks


def scanned_conditions(count, *, start=0):
    return [
        ScannedCondition(ConditionRef(f"{n}.png", f"masks/{n}.png"), f"{n * 7919 % 1000:064x}")
        for n in range(start, start + count)
    ]


def history_with(*plans):
    history = PlanHistory()
    for plan in plans:
        decode_plan(encode_plan(plan), "t", history)
    return history


def test_units_do_not_depend_on_the_order_of_the_conditions():
    first = list(plan_units(scanned_conditions(11), 3, 4, PlanHistory()))
    shuffled = random.Random(0).sample(scanned_conditions(11), 11)
    assert [unit.id for unit in plan_units(shuffled, 3, 4, PlanHistory())] == [
        unit.id for unit in first
    ]
    assert [len(unit.conditions) for unit in first] == [4, 4, 3]
    assert len({unit.id for unit in first}) == 3


def test_conditions_of_earlier_plans_are_not_planned_again():
    first = list(plan_units(scanned_conditions(10), 3, 4, PlanHistory()))
    history = history_with(first)
    assert list(plan_units(scanned_conditions(10), 3, 4, history)) == []
    more = list(plan_units(scanned_conditions(12), 5, 4, history))
    fresh = [unit for unit in more if unit.first_image == 0]
    longer = [unit for unit in more if unit.first_image]
    assert [len(unit.conditions) for unit in fresh] == [2]
    assert sorted(len(unit.conditions) for unit in longer) == [2, 4, 4]
    assert {(unit.first_image, unit.last_image) for unit in longer} == {(3, 4)}
    # Each reads one earlier shard.
    assert {unit.earlier_shards for unit in longer} == {
        (f"shards/{unit.id}.parquet",) for unit in first
    }
    again = history_with(first, more)
    assert list(plan_units(scanned_conditions(12), 5, 4, again)) == []
    [last] = plan_units(scanned_conditions(12)[:1], 6, 4, again)
    assert (last.first_image, len(last.earlier_shards)) == (5, 2)


def test_an_unreadable_condition_is_planned_once():
    bad = ScannedCondition(ConditionRef("bad.png", "bad.png"), None, "broken")
    first = list(plan_units([*scanned_conditions(1), bad], 3, 4, PlanHistory()))
    assert list(plan_units([*scanned_conditions(1), bad], 3, 4, history_with(first))) == []


@pytest.mark.parametrize("damage", ["cut", "columns", "text"])
def test_a_damaged_plan_is_an_error(damage):
    data = encode_plan(plan_units(scanned_conditions(3), 3, 4, PlanHistory()))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"part": [1]}), sink)
    data = {"cut": data[:-9], "columns": sink.getvalue().to_pybytes(), "text": b"hello"}[damage]
    with pytest.raises(IntegrityError, match="where"):
        decode_plan(data, "where", PlanHistory())


def test_a_scan_finds_duplicates_and_broken_masks(tmp_path):
    folder = write_masks(tmp_path / "m", 3)
    inside = folder / "masks" / "train"
    (inside / "twin.png").write_bytes(encode_mask(mask(1)))
    (inside / "bad.png").write_bytes(b"")
    source = MaskSource(str(folder), (), "train")
    scanned = scan_conditions(source, source.list_conditions(), PlanHistory())
    assert [condition.ref.name for condition in scanned] == [
        "000.png",
        "001.png",
        "002.png",
        "bad.png",
        "twin.png",
    ]
    assert [condition.reason is None for condition in scanned] == [True, True, True, False, False]
    assert scanned[4].condition_id == scanned[1].condition_id
    # At another size the masks have other digests.
    source = MaskSource(str(folder), size=(16, 16))
    small = scan_conditions(source, source.list_conditions(), PlanHistory())
    assert small[0].condition_id != scanned[0].condition_id


def test_masks_are_read_from_folders_lists_and_parquet(tmp_path):
    space = {"classes": CLASSES, "split": "val"}
    listed = write_masks(tmp_path / "listed", 3)
    for path in (listed / "masks" / "train").iterdir():
        path.rename(listed / "masks" / path.name)
    (listed / "val.txt").write_text("001\n000\n")
    plain = tmp_path / "plain"
    plain.mkdir()
    table = {"mask": [], "name": ["a", "b"]}
    for number in range(2):
        (plain / f"{number}.png").write_bytes(encode_mask(mask(number)))
        table["mask"].append({"bytes": encode_mask(mask(number)), "path": None})
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table(table), tmp_path / "parquet" / "masks.parquet")
    expected = {
        "listed": ["000.png", "001.png"],
        "plain": ["0.png", "1.png"],
        "parquet": ["a", "b"],
    }
    for kind, names in expected.items():
        source = MaskSource(str(tmp_path / kind), **space)
        refs = source.list_conditions()
        assert [ref.name for ref in refs] == names
        for number, ref in enumerate(refs):
            assert np.array_equal(source.read(ref), mask(number)), kind


def test_missing_masks_and_classes_are_errors(tmp_path):
    with pytest.raises(DatasetError, match=r"no masks; expected masks/train/\*\.png"):
        MaskSource(str(tmp_path), CLASSES, "train").list_conditions()
    with pytest.raises(ConfigError, match=r"no classes\.json"):
        MaskSource(str(tmp_path), (), "train").label_space()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DatasetError, match=r"a\.parquet: not a Parquet file"):
        MaskSource(str(tmp_path), CLASSES, "train").list_conditions()
    write_masks(tmp_path, 1)
    source = MaskSource(str(tmp_path), CLASSES, "train")
    [ref] = source.list_conditions()
    (tmp_path / ref.file).unlink()
    with pytest.raises(DatasetError, match="no longer in"):
        source.read(ref)


def test_each_mask_is_read_from_its_own_file(tmp_path):
    for number in range(24):
        table = pa.table({"mask": [encode_mask(mask(number))], "name": [f"{number:02d}"]})
        pq.write_table(table, tmp_path / f"{number:02d}.parquet")
    source = MaskSource(str(tmp_path), CLASSES, "train")
    scanned = scan_conditions(source, source.list_conditions(), PlanHistory())
    assert [condition.condition_id for condition in scanned] == [
        mask_digest(mask(n)) for n in range(24)
    ]


def test_masks_of_equal_names_are_distinguished(tmp_path):
    numbers, names = [0, 0, 1, 1, 2], ["x", "x", "x", None, None]
    table = {
        "mask": [*(encode_mask(mask(n)) for n in numbers), b"", b""],
        "name": [*names, "x", "x"],
    }
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    source = MaskSource(str(tmp_path), CLASSES, "train")
    scanned = scan_conditions(source, source.list_conditions(), PlanHistory())
    by_row = sorted(scanned, key=lambda one: one.ref.row)
    assert [one.ref.name for one in by_row] == [
        "x",
        "x",
        "x",
        "m.parquet#3",
        "m.parquet#4",
        "x",
        "x",
    ]
    # In code point order of the names, "m.parquet#3" is before "x".
    assert [one.reason for one in by_row[:2]] == [None, "the same ids as 'x' (m.parquet, row 0)"]
    assert [one.reason for one in by_row[2:5]] == ["the same ids as 'm.parquet#3'", None, None]
    assert {one.reason for one in by_row[5:]} == {"mask 'x': not a complete PNG or JPEG image"}
    units = list(plan_units(scanned, 3, 1, PlanHistory()))
    assert len({unit.id for unit in units}) == len(units) == 7
    assert list(plan_units(scanned, 3, 1, history_with(units))) == []
    # When the others get more images, the rejected ones are not planned again.
    assert len(list(plan_units(scanned, 4, 1, history_with(units)))) == 3


def test_a_name_with_a_lone_surrogate_is_planned_once():
    bad = [
        ScannedCondition(ConditionRef(name, name), None, "broken")
        for name in ("a\udcff.png", "a\\udcff.png")
    ]
    first = list(plan_units(bad, 3, 4, PlanHistory()))
    assert list(plan_units(bad, 3, 4, history_with(first))) == []
    assert len(history_with(first).rejected) == 2


def test_a_copy_that_sorts_before_a_used_mask_is_the_duplicate(tmp_path):
    inside = write_masks(tmp_path, 2) / "masks" / "train"
    source = MaskSource(str(tmp_path), (), "train")
    first = list(
        plan_units(
            scan_conditions(source, source.list_conditions(), PlanHistory()), 3, 4, PlanHistory()
        )
    )
    (inside / "00.png").write_bytes(encode_mask(mask(0)))
    history = history_with(first)
    scanned = scan_conditions(source, source.list_conditions(), history)
    [added] = plan_units(scanned, 3, 4, history)
    assert [(one.ref.name, one.reason) for one in added.conditions] == [
        ("00.png", "the same ids as '000.png'")
    ]
    again = history_with(first, [added])
    assert list(plan_units(scanned, 3, 4, again)) == []
    # If the used mask is deleted, its copy replaces it.
    (inside / "000.png").unlink()
    scanned = scan_conditions(source, source.list_conditions(), again)
    assert [condition.reason for condition in scanned] == [None, None]
    assert list(plan_units(scanned, 3, 4, again)) == []
    assert [len(unit.conditions) for unit in plan_units(scanned, 4, 4, again)] == [2]
