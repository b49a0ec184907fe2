import hashlib
import json
import re

import numpy as np
import pytest

from loraseg.data import load_pair, open_dataset
from loraseg.errors import ConfigError, DatasetError, IntegrityError, StageError
from loraseg.segment.closed_set.checkpoint import load_closed_set_segmenter
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.train.closed_set import job
from loraseg.train.closed_set.job import SegmenterTrainingConfig, run_locally, train_segmenters
from tests.tiny_training import LABELS
from tests.unit.train.closed_set.tiny_datasets import (
    TINY_RECIPE,
    coloured_pairs,
    commit_pairs,
    write_datasets,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("world"))


def _config(world, output, **changes):
    plain = {
        "real": str(world / "real"),
        "synthetic": (str(world / "synthetic"),),
        "overrides": TINY_RECIPE,
        "output": str(output),
    }
    return SegmenterTrainingConfig(**{**plain, **changes})


def _never(task):
    raise AssertionError(f"{task.name} was trained again")


def test_writes_segmenter_control_results_and_report(world, tmp_path):
    results = train_segmenters(_config(world, tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["arms"]) == ["segmenter", "control"]
    folder = open_dataset(world / "real")
    for name, arm in results["arms"].items():
        segmenter = load_closed_set_segmenter(tmp_path / f"{name}.safetensors")
        assert segmenter.digest == arm["sha256"]
        confusion = ConfusionMatrix(3)
        for sample in folder.samples("val"):
            image, label = load_pair(folder, sample)
            confusion.add(label, segmenter.labels(image[None])[0])
        np.testing.assert_array_equal(confusion.counts, arm["confusion"])
        assert arm["miou"] == pytest.approx(confusion.miou())
        assert dict(arm["scores"])[arm["step"]] == max(score for _, score in arm["scores"])
        assert [step for step, _ in arm["scores"]] == [2, 4, 6]
    assert results["arms"]["segmenter"]["sha256"] != results["arms"]["control"]["sha256"]
    assert not list((tmp_path / "checkpoints").rglob("*.safetensors"))


def test_the_report_is_one_page_with_valid_pictures(world, tmp_path):
    train_segmenters(_config(world, tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "<script" not in page
    assert page.count("<polyline") == 4
    assert page.count("data:image/png;base64,") == 2 * 4  # image, truth and two arms
    for points in re.findall(r'points="([^"]*)"', page):
        assert all(re.fullmatch(r"[\d.]+,[\d.]+", point) for point in points.split())
    for name in LABELS.names:
        assert f">{name}</th>" in page


def test_a_second_job_does_nothing(world, tmp_path):
    first = train_segmenters(_config(world, tmp_path))
    assert train_segmenters(_config(world, tmp_path), _never) == json.loads(json.dumps(first))
    with pytest.raises(ConfigError, match="holds results of other inputs"):
        train_segmenters(_config(world, tmp_path, seed=1), _never)


def test_a_killed_job_resumes(world, tmp_path, monkeypatch):
    whole = train_segmenters(_config(world, tmp_path / "whole"))
    # Killed after the segmenter and, in a second job, during the control.
    with pytest.raises(AssertionError, match="control"):
        train_segmenters(
            _config(world, tmp_path / "parts"),
            lambda task: run_locally(task) if task.name == "segmenter" else _never(task),
        )
    original = job.train_segmenter

    def dying(recipe, data, seed, context):
        def save(step, scores, state):
            context.save_checkpoint(step, scores, state)
            raise KeyboardInterrupt

        return original(
            recipe,
            data,
            seed,
            type(context)(load_checkpoint=context.load_checkpoint, save_checkpoint=save),
        )

    monkeypatch.setattr(job, "train_segmenter", dying)
    with pytest.raises(KeyboardInterrupt):
        train_segmenters(_config(world, tmp_path / "parts"))
    assert list((tmp_path / "parts" / "checkpoints").rglob("state.safetensors"))
    monkeypatch.setattr(job, "train_segmenter", original)
    parts = train_segmenters(_config(world, tmp_path / "parts"))
    assert parts["arms"] == json.loads(json.dumps(whole["arms"]))


def test_a_job_without_synthetic_data_has_no_control_and_can_be_reused_as_one(world, tmp_path):
    alone = train_segmenters(_config(world, tmp_path / "alone", synthetic=()))
    assert list(alone["arms"]) == ["segmenter"]
    trained = []

    def run(task):
        trained.append(task.name)
        run_locally(task)

    mixed = train_segmenters(_config(world, tmp_path / "mixed", reuse=str(tmp_path / "alone")), run)
    assert trained == ["segmenter"]
    assert mixed["arms"]["control"]["sha256"] == alone["arms"]["segmenter"]["sha256"]
    data = (tmp_path / "mixed" / "control.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == mixed["arms"]["control"]["sha256"]
    # Not if anything differs.
    trained.clear()
    other = _config(world, tmp_path / "other", reuse=str(tmp_path / "alone"), seed=3)
    train_segmenters(other, run)
    assert trained == ["segmenter", "control"]


def test_the_choice_of_images_decides_the_run_digest(world, tmp_path):
    def runs(name="a", **changes):
        tasks, _ = job._plan_tasks(_config(world, tmp_path / name, **changes))
        return [task.run_digest for task in tasks]

    assert runs(images=2) == runs(images=("1", "0"))
    assert runs(images=4) == runs()
    assert runs(images=1) != runs(images=2)
    assert runs(name="b") == runs()
    assert runs(seed=1) != runs()
    # The share of synthetic images changes the segmenter, not its control.
    changed = runs(overrides={**TINY_RECIPE, "synthetic_share": 0.25})
    assert [new == old for new, old in zip(changed, runs(), strict=True)] == [False, True]
    with pytest.raises(ConfigError, match="images: got 5"):
        runs(images=5)
    with pytest.raises(ConfigError, match="no 'x' in split 'train'"):
        runs(images=("0", "x"))
    with pytest.raises(DatasetError, match="no manifest"):
        runs(synthetic=(str(tmp_path / "nothing"),))
    with pytest.raises(ConfigError, match="recipe"):
        runs(recipe="other")


@pytest.mark.parametrize("changed", ["image of train", "mask of val", "synthetic"])
def test_data_that_changes_during_the_job_is_an_error(changed, tmp_path):
    world = write_datasets(tmp_path / "world")
    trained = []

    def late(task):
        """Change the data before the run, as can happen while a worker is pending."""
        if changed == "synthetic":
            images, labels = coloured_pairs(7, 1, side=32)
            pairs = zip(images, labels, strict=True)
            commit_pairs(world / "synthetic", pairs, LABELS.names)
        else:
            kind, _, split = changed.split()
            first, second, *_ = sorted((world / "real" / f"{kind}s" / split).iterdir())
            first.write_bytes(second.read_bytes())
        trained.append(task)
        run_locally(task)

    place = "synthetic" if changed == "synthetic" else "real"
    with pytest.raises(StageError, match=f"segmenter: the data changed .*/{place}; run again"):
        train_segmenters(_config(world, tmp_path / "out"), late)
    (task,) = trained
    results = train_segmenters(_config(world, tmp_path / "out"))
    assert results["arms"]["segmenter"]["run"] != task.run_digest


def test_damaged_results_are_reported(world, tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"results\.json: damaged"):
        train_segmenters(_config(world, tmp_path), _never)
