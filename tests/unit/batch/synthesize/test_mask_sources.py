import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loraseg.batch.synthesize import parquet_masks
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.batch.synthesize.plan import PlanHistory, scan_conditions
from loraseg.data import LabelSpace, open_dataset, write_classes
from loraseg.data.masks import encode_mask
from loraseg.errors import DatasetError, StoreError
from loraseg.storage import LocalStore
from loraseg.synth.lineage import mask_digest
from tests.tiny_synthesis import CLASSES, mask, write_masks

# By stem the first is "img", by file name "img 3.png".
STEMS = ("img", "img 3", "img-b", "Z", "é", "a.b", "img3")


@pytest.mark.parametrize("layout", ["folder", "list"])
def test_masks_come_in_the_order_of_the_training_samples(layout, tmp_path):
    below = "train/" if layout == "folder" else ""
    for kind in ("images", "masks"):
        (tmp_path / kind / below).mkdir(parents=True)
    write_classes(tmp_path / "classes.json", LabelSpace(CLASSES))
    for number, stem in enumerate(STEMS):
        suffix = (".png", ".jpg", ".JPEG")[number % 3]
        (tmp_path / "images" / below / f"{stem}{suffix}").write_bytes(b"is not read")
        (tmp_path / "masks" / below / f"{stem}.png").write_bytes(b"nor this")
    (tmp_path / "train.txt").write_text("\n".join(STEMS))
    expected = [
        Path(sample.mask).name for sample in open_dataset(tmp_path).samples("train") if sample.mask
    ]
    assert expected[:3] == ["Z.png", "a.b.png", "img.png"]
    # Masks without image come last, by name.
    for stem in ("b", "B", "img 2"):
        (tmp_path / "masks" / below / f"{stem}.png").write_bytes(b"nor this")
    (tmp_path / "train.txt").write_text("\n".join([*STEMS, "img 2", "b", "B"]))
    source = MaskSource(str(tmp_path), CLASSES, "train")
    names = [one.name for one in source.list_conditions()]
    assert names == [*expected, "B.png", "b.png", "img 2.png"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"a\nb.png", "control characters"),
        (b"a\\b.png", "backslash"),
        (b"a\xff.png", "not valid Unicode"),
        (b"x" * 240 + b".png", "exceeds 200 bytes"),
    ],
)
def test_a_file_whose_name_no_store_takes_is_a_bad_mask(name, reason, tmp_path):
    folder = write_masks(tmp_path, 1) / "masks" / "train"
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:  # noqa: PTH118, PTH123
        file.write(encode_mask(mask(1)))
    source = MaskSource(str(tmp_path), (), "train")
    found = scan_conditions(source, source.list_conditions(), PlanHistory())
    [bad] = [one for one in found if one.reason]
    assert reason in bad.reason
    assert bad.condition_id is None
    assert len(found) == 2


def test_a_parquet_file_whose_name_no_store_takes_is_one_bad_mask(tmp_path):
    write_table(tmp_path / "a\\b.parquet", [0, 1])
    write_table(tmp_path / "c.parquet", [2])
    source = MaskSource(str(tmp_path), CLASSES, "train")
    found = scan_conditions(source, source.list_conditions(), PlanHistory())
    assert [(one.ref.file, one.reason is None) for one in found] == [
        ("a\\b.parquet", False),
        ("c.parquet", True),
    ]


def test_a_store_that_is_down_ends_the_survey(tmp_path, monkeypatch):
    source = MaskSource(str(write_masks(tmp_path, 2)), (), "train")

    def down(self, key):
        raise StoreError(f"cannot read {key!r}")

    monkeypatch.setattr(LocalStore, "get", down)
    with pytest.raises(StoreError, match=r"cannot read 'masks/train/000\.png'"):
        scan_conditions(source, source.list_conditions(), PlanHistory())


def write_table(path, numbers, *, names=None, **layout):
    """Write masks as Parquet, plain or, for odd numbers of rows, as Hugging Face does."""
    cells = [encode_mask(mask(number)) for number in numbers]
    if len(cells) % 2:
        cells = [{"bytes": cell, "path": f"{n}.png"} for n, cell in enumerate(cells)]
    table = {"mask": cells, **({} if names is None else {"name": names})}
    pq.write_table(pa.table(table), path, **layout)


@pytest.fixture
def fetched(monkeypatch):
    """The keys that were fetched, in their order."""
    keys, get = [], LocalStore.get

    def counted(self, key):
        keys.append(key)
        return get(self, key)

    monkeypatch.setattr(LocalStore, "get", counted)
    return keys


@pytest.mark.parametrize("names", [[None, None, None], [1, 2, 3], [b"\xff", b"b", b"c"]])
def test_a_row_without_text_is_called_by_file_and_number(names, tmp_path):
    write_table(tmp_path / "m.parquet", [0, 1, 2], names=names)
    source = MaskSource(str(tmp_path), CLASSES, "train")
    assert [one.name for one in source.list_conditions()] == [
        f"m.parquet#{row}" for row in range(3)
    ]


@pytest.mark.parametrize("room", [None, 1])
def test_a_survey_fetches_each_file_once_whatever_the_names(room, tmp_path, fetched, monkeypatch):
    if room:  # for one file and one row group, so that any other order would show
        monkeypatch.setattr(parquet_masks, "_FILE_CACHE_BYTES", room)
    for file in range(4):
        names = [f"{row:02d}-{file}" for row in range(9 + file)]
        numbers = [20 * file + row for row in range(9 + file)]
        write_table(tmp_path / f"{file}.parquet", numbers, names=names, row_group_size=4)
    masks = MaskSource(str(tmp_path), CLASSES, "train").list_conditions()
    assert [one.file for one in masks[:4]] == [f"{file}.parquet" for file in range(4)]
    fetched.clear()
    found = scan_conditions(MaskSource(str(tmp_path), CLASSES, "train"), masks, PlanHistory())
    assert fetched == [f"{file}.parquet" for file in range(4)]
    assert [one.ref for one in found] == masks
    for one in found:
        number = 20 * int(one.ref.file[0]) + one.ref.row
        assert one.condition_id == mask_digest(mask(number))
    # A part's masks are in the order of their digests.
    fetched.clear()
    source = MaskSource(str(tmp_path), CLASSES, "train")
    for one in sorted(found, key=lambda one: one.condition_id):
        assert mask_digest(source.read(one.ref)) == one.condition_id
    assert room or len(fetched) == 4


def test_what_is_remembered_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_masks, "_MASK_CACHE_BYTES", 1000)
    write_table(tmp_path / "m.parquet", range(40), row_group_size=4)
    source = MaskSource(str(tmp_path), CLASSES, "train")
    for one in source.list_conditions():
        assert np.array_equal(source.read(one), mask(one.row))
    remembered = source._parquet_reader._masks
    groups = [masks for masks, _ in remembered._values.values()]
    held = sum(len(cell) + 64 for masks in groups for cell in masks)
    assert 0 < held == remembered._size_bytes
    assert held <= 1000 or len(groups) == 1


def test_what_was_asked_for_last_is_remembered():
    recent = parquet_masks._LruCache(10)
    for key in "abac":
        if recent.get(key) is None:
            recent.put(key, key.upper(), 4)
    assert [recent.get(key) for key in "abc"] == ["A", None, "C"]
    recent.put("large", "L", 11)
    assert [recent.get(key) for key in ("a", "c", "large")] == [None, None, "L"]


def test_pictures_beside_the_masks_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_masks, "_MAX_BYTES", 2000)
    table = {
        "image": [np.random.default_rng(n).bytes(5000) for n in range(4)],
        "mask": [encode_mask(mask(n)) for n in range(4)],
    }
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    source = MaskSource(str(tmp_path), CLASSES, "train")
    for number, one in enumerate(source.list_conditions()):
        assert np.array_equal(source.read(one), mask(number))


BOMBS = {
    "dictionary": {"dictionary_pagesize_limit": 10**7, "compression": "none"},
    "prefixes": {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
    "zstd": {"use_dictionary": False, "compression": "zstd"},
}


@pytest.mark.parametrize("column", ["mask", "name"])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_memory_is_gone(kind, column, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_masks, "_MAX_BYTES", 2**20)
    cell = ("a" * 2**18).encode() if column == "mask" else "a" * 2**18
    layout = dict(BOMBS[kind])
    if "column_encoding" in layout:
        layout["column_encoding"] = {column: "DELTA_BYTE_ARRAY"}
    table = {"mask": [encode_mask(mask(0))] * 400, "name": ["x"] * 400, column: [cell] * 400}
    pq.write_table(pa.table(table), tmp_path / "m.parquet", **layout)
    assert (tmp_path / "m.parquet").stat().st_size < 2**20
    source = MaskSource(str(tmp_path), CLASSES, "train")
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(DatasetError, match=rf"row group 0: column '{column}' unfolds"):
            source.read(source.list_conditions()[0])
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < 2 * 2**20


def test_only_the_row_group_that_is_too_large_is_refused(tmp_path, monkeypatch, fetched):
    monkeypatch.setattr(parquet_masks, "_MAX_BYTES", 2**20)
    cells = [encode_mask(mask(0)), encode_mask(mask(1)), *([bytes(2**19)] * 2)]
    layout = {"dictionary_pagesize_limit": 10**7, "row_group_size": 2}
    pq.write_table(pa.table({"mask": cells}), tmp_path / "m.parquet", **layout)
    source = MaskSource(str(tmp_path), CLASSES, "train")
    found = scan_conditions(source, source.list_conditions(), PlanHistory())
    assert [one.reason is None for one in found] == [True, True, False, False]
    assert "smaller row groups" in found[3].reason
    assert fetched == ["m.parquet"]
    # That it was refused is remembered, or each of its rows would unfold it again; but not what
    # it had unfolded to by then.
    _, refused = (value for value, _ in source._parquet_reader._masks._values.values())
    assert isinstance(refused, DatasetError)
    assert refused.__traceback__ is None


def test_what_is_no_mask_says_so(tmp_path):
    pq.write_table(pa.table({"mask": [None, b"x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"mask": [[b"x"]]}), tmp_path / "b.parquet")
    source = MaskSource(str(tmp_path), CLASSES, "train")
    masks = source.list_conditions()
    for one, reason in zip(masks, ["holds no mask", "PNG", "no column 'mask'"], strict=True):
        with pytest.raises(DatasetError, match=reason):
            source.read(one)
