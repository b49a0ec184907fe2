"""Synthesis without Ray: rows, kills, growth, changed inputs and settings."""

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
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def expected(inputs):
    """The output of a run without kills; tests must not change it."""
    synthesize(settings(inputs, inputs / "expected"), LocalExecutor())
    return inputs / "expected"


class KilledExecutor(LocalExecutor):
    """Runs units in random order and raises after some of them, like a killed driver."""

    def __init__(self, units, seed=0):
        super().__init__()
        self._remaining, self._random = units, random.Random(seed)

    def run(self, stages, state, units):
        units = self._random.sample(units, len(units))
        for result in super().run(stages, state, units):
            if self._remaining == 0:
                raise KeyboardInterrupt
            self._remaining -= 1
            yield result


def test_rows_of_a_run(expected):
    rows = all_rows(expected)
    assert len(rows) == 15
    assert len({row.pair_id for row in rows}) == 15
    for row in rows:
        assert (row.status, row.siblings, row.reason) == ("ok", 3, None)
        assert row.prompt
        assert row.kept == pytest.approx(_kept(row))
    dataset = ShardDataset.open(str(expected))
    assert dataset.classes.names == ("road", "sky", "car", "sidewalk")
    assert dataset.manifest.masks == 5


def _kept(row):
    label, mask = (decode_mask(data, where="t") for data in (row.label, row.mask))
    known = mask != 255
    return float(np.mean(label[known] == mask[known]))


def test_labels_are_the_masks_where_the_predictions_agree(expected):
    groups = {}
    for row in all_rows(expected):
        groups.setdefault(row.mask_id, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: row.k)
        predictions = np.stack([decode_mask(row.predicted, where="t") for row in rows])
        mask = decode_mask(rows[0].mask, where="t")
        prototype = majority_vote(predictions, mask=mask, ties="mask_first")
        for row, predicted in zip(rows, predictions, strict=True):
            label = np.where((predicted == prototype) & (mask != 255), mask, 255)
            assert np.array_equal(decode_mask(row.label, where="t"), label)


def test_a_second_run_changes_nothing(expected, inputs):
    files = _bytes(expected)
    summary = synthesize(settings(inputs, expected), LocalExecutor())
    assert summary.new_rows == 0
    assert _bytes(expected) == files


@pytest.mark.parametrize("units", [0, 1, 2])
def test_a_run_after_a_kill_completes_the_output(units, inputs, expected, tmp_path):
    config = settings(inputs, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, KilledExecutor(units, seed=units))
    with pytest.raises(DatasetError, match="no synthetic data is committed"):
        ShardDataset.open(config.output)
    synthesize(config, LocalExecutor())
    assert _bytes(tmp_path / "out") == _bytes(expected)


def test_pairs_do_not_depend_on_the_size_of_units(inputs, expected, tmp_path):
    synthesize(settings(inputs, tmp_path / "out", masks_per_shard=5), LocalExecutor())
    assert digest(tmp_path / "out") == digest(expected)


def test_written_shards_are_not_generated_again(inputs, tmp_path):
    config = settings(inputs, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, KilledExecutor(1))  # the second unit is written, its result is lost
    shards = _bytes(tmp_path / "out" / "shards")
    assert len(shards) == 2
    remaining = []

    class RecordingExecutor(LocalExecutor):
        def run(self, stages, state, units):
            remaining.extend(units)
            return super().run(stages, state, units)

    synthesize(config, RecordingExecutor())
    assert len(remaining) == 1
    assert shards.items() <= _bytes(tmp_path / "out" / "shards").items()


def test_more_masks_and_more_images_are_appended(inputs, expected, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(inputs / "masks", more)
    out = tmp_path / "out"
    shutil.copytree(expected, out)
    write_masks(more, 2, start=5)
    config = settings(inputs, out, masks=str(more), images=4)
    with pytest.raises(ConfigError, match="2 masks are new and 5 have fewer than 4 images"):
        synthesize(config, LocalExecutor())
    before = {row.pair_id: row for row in all_rows(out)}
    config = dataclasses.replace(config, append=True)
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, KilledExecutor(1))
    assert len(all_rows(out)) == 15  # readers see the previous generation
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
    # A single run generates the same images, and the same labels of image 3: all four vote on it.
    whole = tmp_path / "whole"
    synthesize(settings(inputs, whole, masks=str(more), images=4), LocalExecutor())
    whole_rows = {row.pair_id: row for row in all_rows(whole)}
    assert whole_rows.keys() == {row.pair_id for row in rows}
    for row in rows:
        if row.siblings == 4 and row.k == 3:
            assert row.label == whole_rows[row.pair_id].label


def test_unusable_masks_become_rows(inputs, tmp_path):
    masks = write_masks(tmp_path / "masks", 2)
    inside = masks / "masks" / "train"
    shutil.copy(inside / "000.png", inside / "copy.png")
    (inside / "broken.png").write_bytes(b"not an image")
    write_mask(inside / "wide.png", np.full((30, 32), 1, np.uint8))
    write_mask(inside / "nothing.png", np.full((32, 32), 255, np.uint8))
    write_mask(inside / "unknown.png", np.full((32, 32), 7, np.uint8))
    summary = synthesize(settings(inputs, tmp_path / "out", masks=str(masks)), LocalExecutor())
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


def test_more_images_do_not_repeat_rejected_rows(inputs, tmp_path):
    masks = write_masks(tmp_path / "masks", 1)
    inside = masks / "masks" / "train"
    (inside / "broken.png").write_bytes(b"not an image")
    for number, shape in enumerate([(30, 32), (26, 32), (22, 32)]):
        write_mask(inside / f"wide{number}.png", np.full(shape, 1, np.uint8))
    write_mask(inside / "nothing.png", np.full((32, 32), 255, np.uint8))
    config = settings(inputs, tmp_path / "out", masks=str(masks), append=True, masks_per_shard=1)
    for images in (3, 4, 6):
        sampling = dataclasses.replace(config.sampling, images=images)
        larger = dataclasses.replace(config, sampling=sampling)
        manifest = synthesize(larger, LocalExecutor()).manifest
        assert manifest.statuses == {"ok": images, "dropped": 0, "bad_mask": 5, "duplicate": 0}


@pytest.mark.parametrize("change", ["deleted", "replaced", "truncated"])
def test_a_mask_that_changes_during_the_run_ends_it(change, inputs, expected, tmp_path):
    masks = tmp_path / "masks"
    shutil.copytree(inputs / "masks", masks)
    file = masks / "masks" / "train" / "001.png"
    data = file.read_bytes()

    class MaskChanger(LocalExecutor):
        def run(self, stages, state, units):
            if change == "deleted":
                file.unlink()
            else:
                other = file.with_name("002.png").read_bytes()
                file.write_bytes(other if change == "replaced" else other[:40])
            return super().run(stages, state, units)

    config = settings(inputs, tmp_path / "out", masks=str(masks))
    with pytest.raises(StageError, match=r"001\.png.* changed during the run"):
        synthesize(config, MaskChanger())
    file.write_bytes(data)
    synthesize(config, LocalExecutor())
    assert digest(tmp_path / "out") == digest(expected)


def test_a_mask_that_is_too_large_becomes_a_row(inputs, tmp_path, monkeypatch):
    masks = write_masks(tmp_path / "masks", 1)
    write_mask(masks / "masks" / "train" / "large.png", np.full((64, 32), 1, np.uint8))
    monkeypatch.setattr(generate_stage, "_MAX_PIXELS", 32 * 32)
    synthesize(settings(inputs, tmp_path / "out", masks=str(masks)), LocalExecutor())
    reasons = {row.mask_name: row.reason for row in all_rows(tmp_path / "out")}
    assert reasons["large.png"].startswith("64x32 pixels, expected at most 1024 in all")
    assert reasons["000.png"] is None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("cannot allocate memory")])
def test_the_error_of_exhausted_memory_names_the_settings(error, inputs, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Generator, "generate", fail)
    with pytest.raises(StageError, match=r"mask .*32x32; set a smaller sampling\.batch"):
        synthesize(settings(inputs, tmp_path / "out"), LocalExecutor())


def test_a_changed_shard_of_an_earlier_run_is_an_error(inputs, expected, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(expected, out)
    shard = sorted((out / "shards").iterdir())[0]
    data = shard.read_bytes()
    rows = [dataclasses.replace(row, predicted=row.mask) for row in decode_shard(data, "t")]
    shard.write_bytes(encode_shard(rows, ShardDataset.open(str(out)).manifest.classes))
    config = settings(inputs, out, images=4, append=True)
    with pytest.raises(IntegrityError, match=shard.name):
        synthesize(config, LocalExecutor())
    assert ShardDataset.open(str(out)).manifest.generation == 1
    shard.write_bytes(data)
    assert synthesize(config, LocalExecutor()).new_rows == 5


def test_masks_of_equal_names_have_one_row_or_their_images_each(inputs, tmp_path):
    cells = [encode_mask(mask(0)), encode_mask(mask(0)), b"a", b"b", encode_mask(mask(1))]
    masks = tmp_path / "masks"
    masks.mkdir()
    write_classes(masks / "classes.json", LabelSpace(CLASSES))
    names = ["x", "x", "x", "x", None]
    pq.write_table(pa.table({"mask": cells, "name": names}), masks / "m.parquet")
    config = settings(inputs, tmp_path / "out", masks=str(masks), masks_per_shard=1)
    counts = synthesize(config, LocalExecutor()).manifest.statuses
    assert counts == {"ok": 6, "dropped": 0, "bad_mask": 2, "duplicate": 1}
    assert synthesize(config, LocalExecutor()).new_rows == 0
    more = settings(inputs, tmp_path / "out", masks=str(masks), images=4, append=True)
    assert synthesize(more, LocalExecutor()).new_rows == 2
    rejected = [(row.mask_name, row.status) for row in all_rows(tmp_path / "out") if row.reason]
    assert sorted(rejected) == [("x", "bad_mask"), ("x", "bad_mask"), ("x", "duplicate")]


def test_other_settings_are_errors(inputs, expected):
    with pytest.raises(ConfigError, match=r"sampling\.steps was 2 and is 3"):
        synthesize(settings(inputs, expected, steps=3), LocalExecutor())
    plain = settings(inputs, expected, segmenter=None, filter=FilterConfig(method="none"))
    with pytest.raises(ConfigError, match=r"segmenter was .* and is null"):
        synthesize(plain, LocalExecutor())
    with pytest.raises(ConfigError, match="threads was 1 and is 2"):
        synthesize(settings(inputs, expected), LocalExecutor(threads=2))


def test_a_replaced_segmenter_is_an_error(inputs, tmp_path):
    segmenter = write_segmenter(tmp_path / "s.safetensors")
    config = settings(inputs, tmp_path / "out", segmenter=str(segmenter))
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, KilledExecutor(0))
    write_segmenter(segmenter, seed=1)
    for shard in (tmp_path / "out" / "parts").glob("*.json"):
        shard.unlink()
    with pytest.raises(ConfigError, match=r"created with [0-9a-f]{12}, the file is now"):
        synthesize(config, LocalExecutor())


def test_a_segmenter_may_be_moved(inputs, expected, tmp_path):
    moved = tmp_path / "moved.safetensors"
    shutil.copy(inputs / "segmenter.safetensors", moved)
    config = settings(inputs, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        synthesize(config, KilledExecutor(1))
    synthesize(dataclasses.replace(config, segmenter=str(moved)), LocalExecutor())
    assert digest(tmp_path / "out") == digest(expected)


def test_two_simultaneous_runs_write_the_same_bytes(inputs, expected, tmp_path):
    config = settings(inputs, tmp_path / "out")

    class OvertakenExecutor(LocalExecutor):
        def run(self, stages, state, units):
            yield from super().run(stages, state, units)
            synthesize(config, LocalExecutor())

    synthesize(config, OvertakenExecutor())
    assert _bytes(tmp_path / "out") == _bytes(expected)


def test_another_commit_during_the_run_ends_it(inputs, tmp_path):
    config = settings(inputs, tmp_path / "out")

    class OvertakenExecutor(LocalExecutor):
        def run(self, stages, state, units):
            yield from super().run(stages, state, units)
            open_store(config.output).put(MANIFEST_KEY, b"{}")

    with pytest.raises(StageError, match="another run committed"):
        synthesize(config, OvertakenExecutor())


def test_dropped_images_are_reported_and_not_read(inputs, tmp_path):
    config = settings(inputs, tmp_path / "out", filter=FilterConfig(min_kept=1.0))
    counts = synthesize(config, LocalExecutor()).manifest.statuses
    assert counts["dropped"] + counts["ok"] == 15
    assert counts["dropped"] > 0
    dataset = ShardDataset.open(config.output)
    assert sum(1 for _ in dataset.rows()) == len(dataset) == counts["ok"]
    assert "dropped" in (tmp_path / "out" / "report.html").read_text()


def test_without_filter_labels_are_the_masks(inputs, tmp_path):
    config = settings(inputs, tmp_path / "out", segmenter=None, filter=FilterConfig(method="none"))
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
