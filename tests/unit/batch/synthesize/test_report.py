import json
import math

import pytest
import torch

from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.synthesize.report import collect_statistics
from loraseg.batch.synthesize.run import synthesize
from loraseg.batch.synthesize.shard_statistics import ShardStatistics
from loraseg.data.shards.reader import ShardDataset
from tests.tiny_synthesis import all_rows, settings, write_inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    shop = write_inputs(tmp_path_factory.mktemp("shop"), masks=4)
    (shop / "masks" / "masks" / "train" / "bad.png").write_bytes(b"no picture")
    synthesize(settings(shop, shop / "out"), LocalExecutor(torch.get_num_threads()))
    return shop / "out"


def test_notes_say_what_the_rows_say(made):
    rows = all_rows(made)
    found = collect_statistics(ShardDataset.open(str(made)))
    pairs = [row for row in rows if row.kept is not None]
    assert found.pairs == len(pairs) == 12
    assert found.mean_kept == pytest.approx(sum(row.kept for row in pairs) / 12)
    for index, mean in enumerate(found.kept_by_class):
        shares = [share for row in pairs if (share := row.kept_by_class[index]) is not None]
        assert mean == (pytest.approx(sum(shares) / len(shares)) if shares else None)
    assert [(name, status) for name, status, _ in found.rejected] == [("bad.png", "bad_mask")]


@pytest.mark.parametrize("damage", ["lost", "cut", "other", "deep", "endless"])
def test_a_lost_note_costs_only_time(damage, made):
    dataset = ShardDataset.open(str(made))
    expected = collect_statistics(dataset)
    note = next((made / "parts").glob("*.json"))
    kept = note.read_bytes()
    if damage == "lost":
        note.unlink()
    elif damage == "cut":
        note.write_bytes(kept[:-9])
    elif damage == "deep":
        note.write_text("[" * 100_000)
    elif damage == "endless":
        values = json.loads(kept)
        note.write_text(json.dumps({**values, "tally": {**values["tally"], "pairs": math.inf}}))
    else:
        values = json.loads(kept)
        note.write_text(json.dumps({**values, "tally": {**values["tally"], "shares": [1]}}))
    found = collect_statistics(dataset)
    note.write_bytes(kept)
    assert found.kept_sum == pytest.approx(expected.kept_sum)
    assert (found.pairs, found.pair_counts, found.rejected) == (
        expected.pairs,
        expected.pair_counts,
        expected.rejected,
    )


def test_no_rows_are_no_share():
    assert ShardStatistics.merge([], 2).mean_kept == 0
    assert ShardStatistics.merge([], 2).kept_by_class == [None, None]


def test_the_page_and_the_card_name_what_there_is(made):
    page, card = (made / "report.html").read_text(), (made / "README.md").read_text()
    assert "bad.png" in page
    assert "data:image/png;base64," in page
    for text in ("road", "12", "relative"):
        assert text in page
        assert text in card
    assert (made / "sheets" / "first.png").is_file()
