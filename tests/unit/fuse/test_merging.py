import pytest
import torch

from loraseg.errors import IntegrityError
from loraseg.fuse.merging import (
    MergeTable,
    load_table,
    measure_table,
    save_table,
    table_file,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "crossover"),
    # d_in d_out / (d_in + d_out).
    [((768, 768), 384), ((3072, 768), 614.4), ((1024, 1024), 512), ((128, 128), 64)],
)
def test_merges_above_the_crossover(shape, crossover):
    table = MergeTable()
    assert not table.should_merge(shape, int(crossover))
    assert table.should_merge(shape, int(crossover) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges_five_crops_and_the_decoder_but_not_one_crop(dtype):
    table = load_table(CPU, dtype)
    for shape in ((768, 768), (3072, 768)):
        assert not table.should_merge(shape, 577)
        assert table.should_merge(shape, 2885)
    assert table.should_merge((128, 256), 19 * 576)


def test_a_measured_table_is_stored_per_device_and_dtype():
    table = MergeTable(2.0, {(4, 6): 17.5})
    save_table(table, CPU, torch.float32)
    assert load_table(CPU, torch.float32) == table
    assert load_table(CPU, torch.float32).should_merge((4, 6), 18)
    assert not load_table(CPU, torch.float32).should_merge((4, 6), 17)
    assert load_table(CPU, torch.bfloat16).measured == {}


def test_measured_crossovers_stay_in_the_search_interval():
    [(shape, tokens)] = measure_table([(64, 32)], CPU, torch.float32).measured.items()
    assert shape == (64, 32)
    assert 64 * 32 / 96 / 8 <= tokens <= 64 * 32 / 96 * 32


@pytest.mark.parametrize("text", ["", "{}x", "[[1, 2]]", '[["a", 1, 2]]'])
def test_a_broken_table_is_refused_with_its_path(text):
    path = table_file(CPU, torch.float32)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(IntegrityError, match="delete it, or measure again"):
        load_table(CPU, torch.float32)
