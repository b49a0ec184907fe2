"""Statistics and report of a synthetic dataset."""

import json
import math

import pytest

from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.synthesize.report import collect_statistics
from loraseg.batch.synthesize.run import synthesize
from loraseg.batch.synthesize.shard_statistics import ShardStatistics
from loraseg.data.shards.reader import ShardDataset
from tests.tiny_synthesis import all_rows, settings, write_inputs


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), masks=4)
    (folder / "masks" / "masks" / "train" / "bad.png").write_bytes(b"not an image")
    synthesize(settings(folder, folder / "out"), LocalExecutor())
    return folder / "out"


def test_the_statistics_equal_sums_over_the_rows(output):
    rows = all_rows(output)
    statistics = collect_statistics(ShardDataset.open(str(output)))
    pairs = [row for row in rows if row.kept is not None]
    assert statistics.pairs == len(pairs) == 12
    assert statistics.mean_kept == pytest.approx(sum(row.kept for row in pairs) / 12)
    for index, mean in enumerate(statistics.kept_by_class):
        shares = [share for row in pairs if (share := row.kept_by_class[index]) is not None]
        assert mean == (pytest.approx(sum(shares) / len(shares)) if shares else None)
    assert [(name, status) for name, status, _ in statistics.rejected] == [("bad.png", "bad_mask")]


@pytest.mark.parametrize("damage", ["deleted", "cut", "length", "deep", "infinite"])
def test_a_damaged_note_is_replaced_by_reading_the_shard(damage, output):
    dataset = ShardDataset.open(str(output))
    expected = collect_statistics(dataset)
    note = next((output / "parts").glob("*.json"))
    data = note.read_bytes()
    if damage == "deleted":
        note.unlink()
    elif damage == "cut":
        note.write_bytes(data[:-9])
    elif damage == "deep":
        note.write_text("[" * 100_000)
    elif damage == "infinite":
        values = json.loads(data)
        note.write_text(json.dumps({**values, "tally": {**values["tally"], "pairs": math.inf}}))
    else:
        values = json.loads(data)
        note.write_text(json.dumps({**values, "tally": {**values["tally"], "shares": [1]}}))
    statistics = collect_statistics(dataset)
    note.write_bytes(data)
    assert statistics.kept_sum == pytest.approx(expected.kept_sum)
    assert (statistics.pairs, statistics.pair_counts, statistics.rejected) == (
        expected.pairs,
        expected.pair_counts,
        expected.rejected,
    )


def test_statistics_without_rows():
    assert ShardStatistics.merge([], 2).mean_kept == 0
    assert ShardStatistics.merge([], 2).kept_by_class == [None, None]


def test_page_and_card_show_masks_classes_and_filter(output):
    page, card = (output / "report.html").read_text(), (output / "README.md").read_text()
    assert "bad.png" in page
    assert "data:image/png;base64," in page
    for text in ("road", "12", "relative"):
        assert text in page
        assert text in card
    assert (output / "sheets" / "first.png").is_file()
