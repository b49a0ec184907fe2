import dataclasses
import math
import shutil

import numpy as np
import peft
import pytest
import torch
from PIL import Image

from loraseg.adapters import load_adapter
from loraseg.adapters.peft_io import CONFIG_FILE, WEIGHTS_FILE
from loraseg.backbones.clip import load_clip
from loraseg.data import digest_samples, load_pair, open_dataset
from loraseg.errors import ConfigError, DatasetError, StageError
from loraseg.fuse import fuse
from loraseg.library import Library
from loraseg.lru_cache import LruCache
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.storage import open_store
from loraseg.train.segmenter_adapters.recipes import named_recipe
from loraseg.train.tasks import group_tasks, plan_task, train_adapter, train_adapter_group
from tests.unit.train.tiny_files import RECIPE, tiny_task


class Interrupted(Exception):
    pass


def interrupt_at(step):
    def report(progress):
        if progress.phase == "train" and progress.step == step:
            raise Interrupted

    return report


def published(task):
    return Library(open_store(task.library)).load(task.name)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished task with its result and progress reports, shared by tests that only read it."""
    task = tiny_task(tmp_path_factory.mktemp("done"))
    reports = []
    return task, train_adapter(task, reports.append), reports


def test_publishes_an_adapter_with_a_full_card(done):
    task, result, _ = done
    files, card = published(task)
    dataset = open_dataset(task.data)
    assert load_adapter(files).digest == result.digest
    assert (result.name, result.version, result.skipped) == ("fog", 1, False)
    assert card.label_space == ("sky", "road", "car")
    assert card.base.digest == load_base(task.base).digest
    assert card.base.name == "base.safetensors"
    assert (card.training.images, card.training.digest) == (
        4,
        digest_samples(dataset, dataset.samples("train")),
    )
    assert card.recipe["rank"] == 2
    assert card.recipe["loop"]["steps"] == 6
    assert card.recipe["task_digest"] == plan_task(task).digest
    assert set(card.metrics) == {"miou", "miou_base"} == set(result.metrics)
    assert card.code_revision


def test_the_centroid_is_the_mean_of_the_training_images(done):
    task, _, _ = done
    (centroid,) = published(task)[1].centroids
    dataset = open_dataset(task.data)
    images = [dataset.load_image(sample) for sample in dataset.samples("train")]
    clip = load_clip(task.encoder)
    expected = clip.encode_images(images).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(centroid.vector, expected, rtol=0, atol=1e-7)
    assert (centroid.encoder_id, centroid.normalised, centroid.count) == (clip.encoder_id, False, 4)


def test_reports_every_step_and_phase(done):
    _, _, reports = done
    assert [p.phase for p in reports] == [*["train"] * 6, "evaluate", "publish"]
    assert [p.step for p in reports if p.phase == "train"] == [1, 2, 3, 4, 5, 6]
    assert all(p.steps == 6 and p.name == "fog" for p in reports)
    assert all(math.isfinite(p.loss) and p.images_per_s > 0 for p in reports[:6])


def test_the_score_is_that_of_the_published_adapter(done):
    task, result, _ = done
    files, _ = published(task)
    dataset = open_dataset(task.data)
    for mix, name in ((None, "miou_base"), (fuse([load_adapter(files)], [1.0]), "miou")):
        hits, unions = np.zeros(3), np.zeros(3)
        pairs = [load_pair(dataset, sample) for sample in dataset.samples("val")]
        images, masks = zip(*pairs, strict=True)
        predictor = Predictor(load_base(task.base))
        for mask, scores in zip(
            masks, predictor.predict(images, dataset.label_space.names, mix), strict=True
        ):
            label = scores.numpy().argmax(axis=0)
            for c in range(3):
                hits[c] += ((label == c) & (mask == c)).sum()
                unions[c] += ((label == c) | (mask == c)).sum()
        assert result.metrics[name] == pytest.approx((hits / unions).mean(), abs=1e-12)


def test_stock_peft_gives_the_logits_of_the_slots(done, tmp_path):
    task, _, _ = done
    files, _ = published(task)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes(files[name])
    ours, theirs = load_base(task.base), load_base(task.base)
    image = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    mix = fuse([load_adapter(files)], [1.0])
    expected = Predictor(ours).predict([image], ["road", "car"], mix)[0]
    peft.PeftModel.from_pretrained(theirs.model, tmp_path)
    plain = Predictor(theirs).predict([image], ["road", "car"])[0]
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    assert (expected - Predictor(ours).predict([image], ["road", "car"])[0]).abs().max() > 1e-6


@pytest.mark.parametrize("kills", [(1,), (3, 5)])
def test_a_killed_task_resumes_to_the_same_bytes(done, tmp_path, kills):
    task = tiny_task(tmp_path)
    for step in kills:
        with pytest.raises(Interrupted):
            train_adapter(task, interrupt_at(step))
    result = train_adapter(task)
    assert result.resumed_from_step == max(kills) // 2 * 2
    assert result.digest == done[1].digest
    assert published(task)[0] == published(done[0])[0]
    assert list(open_store(task.checkpoints).list()) == []


def test_a_published_task_is_skipped_unless_something_changed(tmp_path):
    task = tiny_task(tmp_path)
    assert not plan_task(task).published
    first = train_adapter(task)
    again = train_adapter(task, interrupt_at(1))
    assert (again.skipped, again.version, again.digest) == (True, 1, first.digest)
    assert again.metrics == first.metrics
    assert plan_task(task).published
    often = named_recipe("miniature", {**RECIPE, "loop": {**RECIPE["loop"], "checkpoint_every": 1}})
    assert plan_task(dataclasses.replace(task, recipe=often)).published
    rank = named_recipe("miniature", {**RECIPE, "rank": 3})
    for change in ({"seed": 1}, {"recipe": rank}, {"images": 2}):
        assert not plan_task(dataclasses.replace(task, **change)).published
    other = train_adapter(dataclasses.replace(task, seed=1))
    assert (other.version, other.skipped) == (2, False)
    assert train_adapter(task).version == 1


def test_a_task_killed_while_scoring_does_not_train_again(done, tmp_path):
    task = tiny_task(tmp_path)

    def kill_when_scoring(progress):
        if progress.phase == "evaluate":
            raise Interrupted

    with pytest.raises(Interrupted):
        train_adapter(task, kill_when_scoring)
    result = train_adapter(task)
    assert (result.resumed_from_step, result.digest) == (6, done[1].digest)


def test_broken_validation_images_are_found_before_training(tmp_path):
    task = tiny_task(tmp_path)
    (tmp_path / "fog" / "images" / "val" / "0.png").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"0\.png"):
        train_adapter(task, interrupt_at(1))


def test_a_changed_config_does_not_resume_old_checkpoints(tmp_path):
    task = tiny_task(tmp_path)
    with pytest.raises(Interrupted):
        train_adapter(task, interrupt_at(5))
    assert train_adapter(dataclasses.replace(task, seed=1)).resumed_from_step == 0


def test_a_plan_describes_the_task(tmp_path):
    task = tiny_task(tmp_path, images=3)
    plan = plan_task(task)
    # 3 CLIP blocks of width 16 and one aggregator layer, r = 2, with the layers of SemLA.
    clip = 3 * (3 * (16 + 16) + 2 * (16 + 64))
    swin = 2 * (2 * (16 + 8 + 16) + 2 * (16 + 16) + 2 * (16 + 64))
    attention = 2 * (16 + 8 + 16) + (16 + 16) + 2 * (16 + 64)
    assert plan.parameters == 2 * (clip + swin + attention)
    assert (plan.name, plan.images, plan.steps) == ("fog", 3, 6)


def test_without_a_validation_split_there_are_no_metrics(tmp_path):
    task = tiny_task(tmp_path)
    shutil.rmtree(tmp_path / "fog" / "images" / "val")
    assert train_adapter(task).metrics == {}


def test_all_ignored_masks_are_refused(tmp_path):
    task = tiny_task(tmp_path)
    for path in (tmp_path / "fog" / "masks" / "train").iterdir():
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(path)
    with pytest.raises(DatasetError, match="no labelled pixel in any of 4 masks"):
        train_adapter(task)


def test_single_ignored_masks_are_skipped_and_counted(tmp_path):
    task = tiny_task(tmp_path, recipe={**RECIPE, "batch_size": 1})
    path = tmp_path / "fog" / "masks" / "train" / "0.png"
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(path)
    train_adapter(task)
    # Six batches of one image each: the first epoch of four has the unlabelled image once.
    assert published(task)[1].recipe["skipped_batches"] in (1, 2)


def test_broken_images_are_refused(tmp_path):
    task = tiny_task(tmp_path)
    (tmp_path / "fog" / "images" / "train" / "1.png").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"1\.png"):
        train_adapter(task)


def test_images_without_masks_are_refused(tmp_path):
    task = tiny_task(tmp_path)
    shutil.rmtree(tmp_path / "fog" / "masks" / "train")
    with pytest.raises(DatasetError, match="4 without a mask"):
        train_adapter(task)


def test_skip_bad_leaves_out_broken_images(tmp_path):
    task = tiny_task(tmp_path, skip_bad=True)
    (tmp_path / "fog" / "images" / "train" / "1.png").write_bytes(b"not an image")
    assert plan_task(task).images == 3
    assert train_adapter(task).version == 1


def test_an_infinite_loss_is_an_error_with_the_step(tmp_path):
    task = tiny_task(tmp_path, recipe={**RECIPE, "learning_rate": 1e38, "alpha": 1e8})
    with pytest.raises(StageError, match=r"step [0-9]+: the (loss|gradient norm) is"):
        train_adapter(task)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"name": "../x"}, "name: "), ({"name": "A"}, "name: "), ({"images": 0}, "images: got 0")],
)
def test_invalid_names_and_counts_are_refused(tmp_path, changes, reason):
    task = tiny_task(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        dataclasses.replace(task, **changes)


def sweep(folder, *ranks, **changes):
    """Tasks on one dataset that differ in name and rank."""
    task = tiny_task(folder, data_order="per_dataset", **changes)
    rules = {rank: {**RECIPE, "targets": "aggregator", "rank": rank} for rank in ranks}
    return [
        dataclasses.replace(task, name=f"rank-{rank}", recipe=named_recipe("miniature", rule))
        for rank, rule in rules.items()
    ]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Results of a sweep whose tasks are trained one by one, by name."""
    tasks = sweep(tmp_path_factory.mktemp("swept"), 1, 2, 4)
    return {task.name: train_adapter(task) for task in tasks}


def test_a_group_gives_the_bytes_of_each_task_alone(swept, tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(
        "loraseg.train.segmenter_adapters.job.mean_iou",
        lambda *args: (scored.append(args[3]), 0.5)[1],
    )
    monkeypatch.setattr("loraseg.train.segmenter_adapters.job._base_scores", LruCache(64))
    tasks = sweep(tmp_path, 4, 1, 2)
    results = train_adapter_group(tasks)
    assert [result.digest for result in results] == [swept[task.name].digest for task in tasks]
    assert len({result.digest for result in results}) == 3
    # The bare base is scored once.
    assert scored.count(None) == 1
    assert len(scored) == 4


def test_the_cached_base_score_equals_a_new_one(swept, tmp_path, monkeypatch):
    monkeypatch.setattr("loraseg.train.segmenter_adapters.job._base_scores", LruCache(64))
    (result,) = train_adapter_group(sweep(tmp_path, 2))
    assert result.metrics == swept["rank-2"].metrics


def test_a_killed_group_resumes_in_another_grouping(swept, tmp_path):
    tasks = sweep(tmp_path, 1, 2, 4)
    with pytest.raises(Interrupted):
        train_adapter_group(tasks, interrupt_at(5))
    alone = train_adapter(tasks[1])
    together = train_adapter_group(tasks)
    assert [result.skipped for result in together] == [False, True, False]
    assert [r.resumed_from_step for r in (alone, together[0], together[2])] == [4, 4, 4]
    assert [result.digest for result in together] == [swept[task.name].digest for task in tasks]
    assert list(open_store(tasks[0].checkpoints).list()) == []


def test_an_error_of_one_task_does_not_end_its_group(swept, tmp_path):
    tasks = sweep(tmp_path, 1, 2)
    wild = {"learning_rate": 1e38, "alpha": 1e8}
    tasks[0] = dataclasses.replace(tasks[0], recipe=dataclasses.replace(tasks[0].recipe, **wild))
    failed, good = train_adapter_group(tasks)
    assert isinstance(failed, StageError)
    assert good.digest == swept["rank-2"].digest


def test_the_order_of_data_decides_which_batches_an_adapter_sees(tmp_path):
    loop = {"steps": 2, "warmup_steps": 1, "checkpoint_every": 2}
    task = tiny_task(tmp_path, images=2, recipe={**RECIPE, "loop": loop})
    shutil.rmtree(tmp_path / "fog" / "images" / "val")
    other = dataclasses.replace(task, name="again")
    digests = {train_adapter(one).digest for one in (task, other)}
    assert len(digests) == 2
    shared = [dataclasses.replace(one, data_order="per_dataset") for one in (task, other)]
    assert len({train_adapter(one).digest for one in shared}) == 1
    assert plan_task(shared[0]).digest != plan_task(task).digest


def test_only_tasks_that_share_work_are_grouped(tmp_path):
    alike = sweep(tmp_path, 1, 2, 4)
    apart = [
        *sweep(tmp_path, 3, seed=1),
        *sweep(tmp_path, 5, images=2),
        dataclasses.replace(alike[0], name="own-order", data_order="per_adapter"),
        tiny_task(tmp_path, name="fog", data_order="per_dataset"),
    ]
    tasks = [alike[0], *apart[:2], alike[1], *apart[2:], alike[2]]
    assert group_tasks(tasks, max_size=8) == [(0, 3, 6), (1,), (2,), (4,), (5,)]
    assert group_tasks(tasks, max_size=2) == [(0, 3), (1,), (2,), (4,), (5,), (6,)]
    assert group_tasks(tasks, max_size=1) == [(index,) for index in range(7)]
    with pytest.raises(ConfigError, match="rank-1, rank-3: cannot be trained together"):
        train_adapter_group([alike[0], apart[0]])
