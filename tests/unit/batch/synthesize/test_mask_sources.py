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

# "img" sorts before "img 3" as a stem, and "img 3.png" before "img.png" as a file name.
STEMS = ("img", "img 3", "img-b", "Z", "é", "a.b", "img3")


@pytest.mark.parametrize("layout", ["folder", "list"])
def test_masks_have_the_order_of_the_training_samples(layout, tmp_path):
    below = "train/" if layout == "folder" else ""
    for kind in ("images", "masks"):
        (tmp_path / kind / below).mkdir(parents=True)
    write_classes(tmp_path / "classes.json", LabelSpace(CLASSES))
    for number, stem in enumerate(STEMS):
        suffix = (".png", ".jpg", ".JPEG")[number % 3]
        (tmp_path / "images" / below / f"{stem}{suffix}").write_bytes(b"not read")
        (tmp_path / "masks" / below / f"{stem}.png").write_bytes(b"not read")
    (tmp_path / "train.txt").write_text("\n".join(STEMS))
    expected = [
        Path(sample.mask).name for sample in open_dataset(tmp_path).samples("train") if sample.mask
    ]
    assert expected[:3] == ["Z.png", "a.b.png", "img.png"]
    # Masks without an image follow, by name.
    for stem in ("b", "B", "img 2"):
        (tmp_path / "masks" / below / f"{stem}.png").write_bytes(b"not read")
    (tmp_path / "train.txt").write_text("\n".join([*STEMS, "img 2", "b", "B"]))
    source = MaskSource(str(tmp_path), CLASSES, "train")
    names = [ref.name for ref in source.list_conditions()]
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
def test_a_file_with_an_invalid_key_is_a_bad_mask(name, reason, tmp_path):
    folder = write_masks(tmp_path, 1) / "masks" / "train"
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:  # noqa: PTH118, PTH123
        file.write(encode_mask(mask(1)))
    source = MaskSource(str(tmp_path), (), "train")
    scanned = scan_conditions(source, source.list_conditions(), PlanHistory())
    [bad] = [condition for condition in scanned if condition.reason]
    assert reason in bad.reason
    assert bad.condition_id is None
    assert len(scanned) == 2


def test_a_parquet_file_with_an_invalid_key_is_one_bad_mask(tmp_path):
    write_table(tmp_path / "a\\b.parquet", [0, 1])
    write_table(tmp_path / "c.parquet", [2])
    source = MaskSource(str(tmp_path), CLASSES, "train")
    scanned = scan_conditions(source, source.list_conditions(), PlanHistory())
    assert [(one.ref.file, one.reason is None) for one in scanned] == [
        ("a\\b.parquet", False),
        ("c.parquet", True),
    ]


def test_a_store_error_ends_the_scan(tmp_path, monkeypatch):
    source = MaskSource(str(write_masks(tmp_path, 2)), (), "train")

    def fail(self, key):
        raise StoreError(f"cannot read {key!r}")

    monkeypatch.setattr(LocalStore, "get", fail)
    with pytest.raises(StoreError, match=r"cannot read 'masks/train/000\.png'"):
        scan_conditions(source, source.list_conditions(), PlanHistory())


def write_table(path, numbers, *, names=None, **layout):
    """Write masks as Parquet: an odd number of rows as Hugging Face does, else plain bytes."""
    cells = [encode_mask(mask(number)) for number in numbers]
    if len(cells) % 2:
        cells = [{"bytes": cell, "path": f"{n}.png"} for n, cell in enumerate(cells)]
    table = {"mask": cells, **({} if names is None else {"name": names})}
    pq.write_table(pa.table(table), path, **layout)


@pytest.fixture
def read_keys(monkeypatch):
    """The keys of all reads, in order."""
    keys, get = [], LocalStore.get

    def record(self, key):
        keys.append(key)
        return get(self, key)

    monkeypatch.setattr(LocalStore, "get", record)
    return keys


@pytest.mark.parametrize("names", [[None, None, None], [1, 2, 3], [b"\xff", b"b", b"c"]])
def test_a_row_without_a_text_is_named_by_file_and_number(names, tmp_path):
    write_table(tmp_path / "m.parquet", [0, 1, 2], names=names)
    source = MaskSource(str(tmp_path), CLASSES, "train")
    assert [ref.name for ref in source.list_conditions()] == [
        f"m.parquet#{row}" for row in range(3)
    ]


@pytest.mark.parametrize("cache_bytes", [None, 1])
def test_a_scan_reads_each_file_once(cache_bytes, tmp_path, read_keys, monkeypatch):
    if cache_bytes:  # the cache holds one file, so another order would read files again
        monkeypatch.setattr(parquet_masks, "_FILE_CACHE_BYTES", cache_bytes)
    for file in range(4):
        names = [f"{row:02d}-{file}" for row in range(9 + file)]
        numbers = [20 * file + row for row in range(9 + file)]
        write_table(tmp_path / f"{file}.parquet", numbers, names=names, row_group_size=4)
    masks = MaskSource(str(tmp_path), CLASSES, "train").list_conditions()
    assert [one.file for one in masks[:4]] == [f"{file}.parquet" for file in range(4)]
    read_keys.clear()
    scanned = scan_conditions(MaskSource(str(tmp_path), CLASSES, "train"), masks, PlanHistory())
    assert read_keys == [f"{file}.parquet" for file in range(4)]
    assert [one.ref for one in scanned] == masks
    for one in scanned:
        number = 20 * int(one.ref.file[0]) + one.ref.row
        assert one.condition_id == mask_digest(mask(number))
    # The masks of a unit are sorted by digest.
    read_keys.clear()
    source = MaskSource(str(tmp_path), CLASSES, "train")
    for one in sorted(scanned, key=lambda one: one.condition_id):
        assert mask_digest(source.read(one.ref)) == one.condition_id
    assert cache_bytes or len(read_keys) == 4


def test_the_cache_of_masks_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_masks, "_MASK_CACHE_BYTES", 1000)
    write_table(tmp_path / "m.parquet", range(40), row_group_size=4)
    source = MaskSource(str(tmp_path), CLASSES, "train")
    for ref in source.list_conditions():
        assert np.array_equal(source.read(ref), mask(ref.row))
    cache = source._parquet_reader._masks
    groups = list(cache._values.values())
    size = sum(len(cell) + 64 for masks in groups for cell in masks)
    assert 0 < size == cache.size
    assert size <= 1000 or len(groups) == 1


def test_other_columns_do_not_count(tmp_path, monkeypatch):
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
def test_a_parquet_bomb_is_rejected_in_little_memory(kind, column, tmp_path, monkeypatch):
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
        with pytest.raises(DatasetError, match=rf"row group 0: column '{column}' expands"):
            source.read(source.list_conditions()[0])
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < 2 * 2**20


def test_only_the_row_group_that_is_too_large_is_rejected(tmp_path, monkeypatch, read_keys):
    monkeypatch.setattr(parquet_masks, "_MAX_BYTES", 2**20)
    cells = [encode_mask(mask(0)), encode_mask(mask(1)), *([bytes(2**19)] * 2)]
    layout = {"dictionary_pagesize_limit": 10**7, "row_group_size": 2}
    pq.write_table(pa.table({"mask": cells}), tmp_path / "m.parquet", **layout)
    source = MaskSource(str(tmp_path), CLASSES, "train")
    scanned = scan_conditions(source, source.list_conditions(), PlanHistory())
    assert [one.reason is None for one in scanned] == [True, True, False, False]
    assert "smaller row groups" in scanned[3].reason
    assert read_keys == ["m.parquet"]
    # The error is cached, or each of the rows would expand the group again; the cells are not.
    _, error = source._parquet_reader._masks._values.values()
    assert isinstance(error, DatasetError)
    assert error.__traceback__ is None


def test_cells_that_are_not_masks_are_errors(tmp_path):
    pq.write_table(pa.table({"mask": [None, b"x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"mask": [[b"x"]]}), tmp_path / "b.parquet")
    source = MaskSource(str(tmp_path), CLASSES, "train")
    masks = source.list_conditions()
    for one, reason in zip(masks, ["holds no mask", "PNG", "no column 'mask'"], strict=True):
        with pytest.raises(DatasetError, match=reason):
            source.read(one)
