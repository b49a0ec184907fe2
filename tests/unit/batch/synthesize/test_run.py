import dataclasses
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.synthesize import generate_stage
from loraseg.batch.synthesize.run import synthesize
from loraseg.data import LabelSpace, write_classes
from loraseg.data.masks import decode_mask, encode_mask, write_mask
from loraseg.data.shards.manifest import MANIFEST_KEY
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import decode_shard, encode_shard
from loraseg.errors import ConfigError, DatasetError, IntegrityError, StageError
from loraseg.storage import open_store
from loraseg.synth.generator import Generator
from loraseg.synth.majority_vote import majority_vote
from loraseg.synth.vote import FilterConfig
from tests.tiny_synthesis import (
    CLASSES,
    all_rows,
    digest,
    mask,
    settings,
    write_inputs,
    write_masks,
    write_segmenter,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def undisturbed(shop):
    """A run without accidents, which tests must leave as it is."""
    synthesize(settings(shop, shop / "undisturbed"), LocalExecutor())
    return shop / "undisturbed"


class KilledExecutor(LocalExecutor):
    """Ends after some parts like a driver that is killed, and does them in any order."""

    def __init__(self, parts, seed=0):
        super().__init__()
        self._left, self._random = parts, random.Random(seed)

    def run(self, stages, state, units):
        units = self._random.sample(units, len(units))
        for outcome in super().run(stages, state, units):
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            yield outcome


def test_rows_say_what_a_stranger_wants_to_know(undisturbed):
    rows = all_rows(undisturbed)
    assert len(rows) == 15
    assert len({row.pair_id for row in rows}) == 15
    for row in rows:
        assert (row.status, row.siblings, row.reason) == ("ok", 3, None)
        assert row.prompt
        assert row.kept == pytest.approx(_kept(row))
    dataset = ShardDataset.open(str(undisturbed))
    assert dataset.classes.names == ("road", "sky", "car", "sidewalk")
    assert dataset.manifest.masks == 5


def _kept(row):
    label, mask = (decode_mask(data, where="t") for data in (row.label, row.mask))
    known = mask != 255
    return float(np.mean(label[known] == mask[known]))


def test_labels_are_the_masks_where_the_siblings_agree(undisturbed):
    groups = {}
    for row in all_rows(undisturbed):
        groups.setdefault(row.mask_id, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: row.k)
        seen = np.stack([decode_mask(row.predicted, where="t") for row in rows])
        mask = decode_mask(rows[0].mask, where="t")
        prototype = majority_vote(seen, mask=mask, ties="mask_first")
        for row, own in zip(rows, seen, strict=True):
            expected = np.where((own == prototype) & (mask != 255), mask, 255)
            assert np.array_equal(decode_mask(row.label, where="t"), expected)


def test_again_does_nothing(undisturbed, shop):
    files = _bytes(undisturbed)
    summary = synthesize(settings(shop, undisturbed), LocalExecutor())
    assert summary.new_rows == 0
    assert _bytes(undisturbed) == files


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_a_run_that_died_is_finished_by_the_next(parts, shop, undisturbed, tmp_path):
    config = settings(shop, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, KilledExecutor(parts, seed=parts))
    with pytest.raises(DatasetError, match="no synthetic data is committed"):
        ShardDataset.open(config.output)
    synthesize(config, LocalExecutor())
    assert _bytes(tmp_path / "out") == _bytes(undisturbed)


def test_how_parts_are_cut_changes_no_pair(shop, undisturbed, tmp_path):
    synthesize(settings(shop, tmp_path / "out", masks_per_shard=5), LocalExecutor())
    assert digest(tmp_path / "out") == digest(undisturbed)


def test_a_part_that_is_done_is_not_done_again(shop, tmp_path):
    config = settings(shop, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        synthesize(
            config, KilledExecutor(1)
        )  # it ends after the second part, of which it is not told
    done = _bytes(tmp_path / "out" / "shards")
    assert len(done) == 2
    left = []

    class Counting(LocalExecutor):
        def run(self, stages, state, units):
            left.extend(units)
            return super().run(stages, state, units)

    synthesize(config, Counting())
    assert len(left) == 1
    assert done.items() <= _bytes(tmp_path / "out" / "shards").items()


def test_more_masks_and_more_images_are_appended(shop, undisturbed, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(shop / "masks", more)
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    write_masks(more, 2, start=5)
    config = settings(shop, out, masks=str(more), images=4)
    with pytest.raises(ConfigError, match="2 masks are new and 5 have fewer than 4 images"):
        synthesize(config, LocalExecutor())
    before = {row.pair_id: row for row in all_rows(out)}
    config = dataclasses.replace(config, append=True)
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, KilledExecutor(1))
    assert len(all_rows(out)) == 15  # readers see the generation before
    summary = synthesize(config, LocalExecutor())
    assert (summary.new_rows, summary.manifest.generation) == (5 + 2 * 4, 2)
    rows = all_rows(out)
    assert len({row.pair_id for row in rows}) == len(rows) == 28
    for row in rows:
        if row.pair_id in before:
            assert (row.image, row.label) == (before[row.pair_id].image, before[row.pair_id].label)
        else:
            assert row.siblings == 4
    assert synthesize(config, LocalExecutor()).new_rows == 0
    # In one go the images are the same, and so are the labels of those that voted among all four.
    whole = tmp_path / "whole"
    synthesize(settings(shop, whole, masks=str(more), images=4), LocalExecutor())
    told = {row.pair_id: row for row in all_rows(whole)}
    assert told.keys() == {row.pair_id for row in rows}
    for row in rows:
        if row.siblings == 4 and row.k == 3:
            assert row.label == told[row.pair_id].label


def test_what_cannot_be_used_becomes_a_row(shop, tmp_path):
    masks = write_masks(tmp_path / "masks", 2)
    inside = masks / "masks" / "train"
    shutil.copy(inside / "000.png", inside / "copy.png")
    (inside / "broken.png").write_bytes(b"no picture")
    write_mask(inside / "wide.png", np.full((30, 32), 1, np.uint8))
    write_mask(inside / "nothing.png", np.full((32, 32), 255, np.uint8))
    write_mask(inside / "unknown.png", np.full((32, 32), 7, np.uint8))
    summary = synthesize(settings(shop, tmp_path / "out", masks=str(masks)), LocalExecutor())
    counts = summary.manifest.statuses
    assert counts == {"ok": 6, "dropped": 0, "bad_mask": 4, "duplicate": 1}
    reasons = {row.mask_name: row.reason for row in all_rows(tmp_path / "out") if row.reason}
    assert "multiples of" in reasons["wide.png"]
    assert "every pixel is ignored" in reasons["nothing.png"]
    assert "ids [7]" in reasons["unknown.png"]
    assert "000.png" in reasons["copy.png"]
    assert "PNG" in reasons["broken.png"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in reasons)


def test_more_images_do_not_tell_a_refusal_again(shop, tmp_path):
    masks = write_masks(tmp_path / "masks", 1)
    inside = masks / "masks" / "train"
    (inside / "broken.png").write_bytes(b"no picture")
    for number, shape in enumerate([(30, 32), (26, 32), (22, 32)]):
        write_mask(inside / f"wide{number}.png", np.full(shape, 1, np.uint8))
    write_mask(inside / "nothing.png", np.full((32, 32), 255, np.uint8))
    config = settings(shop, tmp_path / "out", masks=str(masks), append=True, masks_per_shard=1)
    for images in (3, 4, 6):
        sampling = dataclasses.replace(config.sampling, images=images)
        found = synthesize(dataclasses.replace(config, sampling=sampling), LocalExecutor()).manifest
        assert found.statuses == {"ok": images, "dropped": 0, "bad_mask": 5, "duplicate": 0}


@pytest.mark.parametrize("accident", ["gone", "changed", "broken"])
def test_a_mask_that_changes_meanwhile_costs_only_a_run(accident, shop, undisturbed, tmp_path):
    masks = tmp_path / "masks"
    shutil.copytree(shop / "masks", masks)
    file = masks / "masks" / "train" / "001.png"
    kept = file.read_bytes()

    class Careless(LocalExecutor):
        def run(self, stages, state, units):
            if accident == "gone":
                file.unlink()
            else:
                other = file.with_name("002.png").read_bytes()
                file.write_bytes(other if accident == "changed" else other[:40])
            return super().run(stages, state, units)

    config = settings(shop, tmp_path / "out", masks=str(masks))
    with pytest.raises(StageError, match=r"001\.png.* changed during the run"):
        synthesize(config, Careless())
    file.write_bytes(kept)
    synthesize(config, LocalExecutor())
    assert digest(tmp_path / "out") == digest(undisturbed)


def test_a_mask_too_large_for_any_machine_becomes_a_row(shop, tmp_path, monkeypatch):
    masks = write_masks(tmp_path / "masks", 1)
    write_mask(masks / "masks" / "train" / "large.png", np.full((64, 32), 1, np.uint8))
    monkeypatch.setattr(generate_stage, "_MAX_PIXELS", 32 * 32)
    synthesize(settings(shop, tmp_path / "out", masks=str(masks)), LocalExecutor())
    reasons = {row.mask_name: row.reason for row in all_rows(tmp_path / "out")}
    assert reasons["large.png"].startswith("64x32 pixels, expected at most 1024 in all")
    assert reasons["000.png"] is None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("cannot allocate memory")])
def test_a_lack_of_memory_says_what_to_do(error, shop, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Generator, "generate", fail)
    with pytest.raises(StageError, match=r"mask .*32x32; set a smaller sampling\.batch"):
        synthesize(settings(shop, tmp_path / "out"), LocalExecutor())


def test_votes_are_not_mixed_with_what_is_not_committed(shop, undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shard = sorted((out / "shards").iterdir())[0]
    good = shard.read_bytes()
    rows = [dataclasses.replace(row, predicted=row.mask) for row in decode_shard(good, "t")]
    shard.write_bytes(encode_shard(rows, ShardDataset.open(str(out)).manifest.classes))
    config = settings(shop, out, images=4, append=True)
    with pytest.raises(IntegrityError, match=shard.name):
        synthesize(config, LocalExecutor())
    assert ShardDataset.open(str(out)).manifest.generation == 1
    shard.write_bytes(good)
    assert synthesize(config, LocalExecutor()).new_rows == 5


def test_masks_of_one_name_are_all_made_or_told_once(shop, tmp_path):
    cells = [encode_mask(mask(0)), encode_mask(mask(0)), b"a", b"b", encode_mask(mask(1))]
    masks = tmp_path / "masks"
    masks.mkdir()
    write_classes(masks / "classes.json", LabelSpace(CLASSES))
    names = ["x", "x", "x", "x", None]
    pq.write_table(pa.table({"mask": cells, "name": names}), masks / "m.parquet")
    config = settings(shop, tmp_path / "out", masks=str(masks), masks_per_shard=1)
    counts = synthesize(config, LocalExecutor()).manifest.statuses
    assert counts == {"ok": 6, "dropped": 0, "bad_mask": 2, "duplicate": 1}
    assert synthesize(config, LocalExecutor()).new_rows == 0
    more = settings(shop, tmp_path / "out", masks=str(masks), images=4, append=True)
    assert synthesize(more, LocalExecutor()).new_rows == 2
    told = [(row.mask_name, row.status) for row in all_rows(tmp_path / "out") if row.reason]
    assert sorted(told) == [("x", "bad_mask"), ("x", "bad_mask"), ("x", "duplicate")]


def test_other_settings_are_refused(shop, undisturbed):
    with pytest.raises(ConfigError, match=r"sampling\.steps was 2 and is 3"):
        synthesize(settings(shop, undisturbed, steps=3), LocalExecutor())
    plain = settings(shop, undisturbed, segmenter=None, filter=FilterConfig(method="none"))
    with pytest.raises(ConfigError, match=r"segmenter was .* and is null"):
        synthesize(plain, LocalExecutor())
    with pytest.raises(ConfigError, match="threads was 1 and is 2"):
        synthesize(settings(shop, undisturbed), LocalExecutor(threads=2))


def test_another_segmenter_in_the_same_place_is_noticed(shop, tmp_path):
    segmenter = write_segmenter(tmp_path / "s.safetensors")
    config = settings(shop, tmp_path / "out", segmenter=str(segmenter))
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, KilledExecutor(0))
    write_segmenter(segmenter, seed=1)
    for shard in (tmp_path / "out" / "parts").glob("*.json"):
        shard.unlink()
    with pytest.raises(ConfigError, match=r"created with [0-9a-f]{12}, the file is now"):
        synthesize(config, LocalExecutor())


def test_a_segmenter_may_be_moved(shop, undisturbed, tmp_path):
    moved = tmp_path / "moved.safetensors"
    shutil.copy(shop / "segmenter.safetensors", moved)
    config = settings(shop, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, KilledExecutor(1))
    synthesize(dataclasses.replace(config, segmenter=str(moved)), LocalExecutor())
    assert digest(tmp_path / "out") == digest(undisturbed)


def test_two_runs_that_end_together_agree(shop, undisturbed, tmp_path):
    config = settings(shop, tmp_path / "out")

    class Overtaken(LocalExecutor):
        def run(self, stages, state, units):
            yield from super().run(stages, state, units)
            synthesize(config, LocalExecutor())

    synthesize(config, Overtaken())
    assert _bytes(tmp_path / "out") == _bytes(undisturbed)


def test_a_commit_of_another_run_in_between_stops_this_one(shop, tmp_path):
    config = settings(shop, tmp_path / "out")

    class Overtaken(LocalExecutor):
        def run(self, stages, state, units):
            yield from super().run(stages, state, units)
            open_store(config.output).put(MANIFEST_KEY, b"{}")

    with pytest.raises(StageError, match="another run committed"):
        synthesize(config, Overtaken())


def test_dropped_images_are_told_and_not_read(shop, tmp_path):
    config = settings(shop, tmp_path / "out", filter=FilterConfig(min_kept=1.0))
    counts = synthesize(config, LocalExecutor()).manifest.statuses
    assert counts["dropped"] + counts["ok"] == 15
    assert counts["dropped"] > 0
    dataset = ShardDataset.open(config.output)
    assert sum(1 for _ in dataset.rows()) == len(dataset) == counts["ok"]
    assert "dropped" in (tmp_path / "out" / "report.html").read_text()


def test_without_filter_labels_are_the_masks(shop, tmp_path):
    config = settings(shop, tmp_path / "out", segmenter=None, filter=FilterConfig(method="none"))
    synthesize(config, LocalExecutor())
    for row in all_rows(tmp_path / "out"):
        assert row.label == row.mask
        assert (row.kept, row.predicted) == (1.0, None)


def _bytes(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
