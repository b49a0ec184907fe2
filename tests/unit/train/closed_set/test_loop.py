import dataclasses
import math

import numpy as np
import pytest
import torch

from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, IntegrityError, StageError
from loraseg.segment.closed_set.checkpoint import decode_closed_set_segmenter
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.train.closed_set import loop
from loraseg.train.closed_set.loop import TrainingContext, TrainingData, train_segmenter
from loraseg.train.closed_set.recipes import (
    SEGMENTER_RECIPES,
    lr_factor,
    named_segmenter_recipe,
)
from loraseg.train.closed_set.samples import ArrayPairs
from tests.unit.train.closed_set.tiny_datasets import coloured_pairs

_SPACE = LabelSpace(("red", "green", "blue"))


def _recipe(**changes):
    plain = {
        "network": {"width": 8},
        "steps": 24,
        "crop": 16,
        "batch_size": 4,
        "eval_every": 8,
        "warmup_steps": 2,
        "precision": "fp32",
    }
    return named_segmenter_recipe("unet-miniature", {**plain, **changes})


def _data(synthetic=True):
    def pairs(count, seed):
        images, labels = coloured_pairs(count, seed)
        return ArrayPairs(list(images), list(labels))

    return TrainingData(
        label_space=_SPACE,
        real=pairs(6, 0),
        synthetic=pairs(8, 1) if synthetic else None,
        val=pairs(5, 2),
    )


class _Checkpoints:
    """Stores checkpoints and raises an error after the one at ``until``."""

    def __init__(self, until=None):
        self.data, self.steps, self.until = None, [], until

    def context(self):
        return TrainingContext(load_checkpoint=lambda: self.data, save_checkpoint=self._save)

    def _save(self, step, scores, data):
        assert set(scores) == {"loss", "val_miou"}
        self.data = data
        self.steps.append(step)
        if step == self.until:
            raise KeyboardInterrupt


def test_training_returns_the_best_checkpoint():
    checkpoints = _Checkpoints()
    trained = train_segmenter(_recipe(), _data(), 0, checkpoints.context())
    assert checkpoints.steps == [8, 16, 24]
    scores = dict(trained.curves.scores)
    assert list(scores) == [8, 16, 24]
    assert trained.confusion.miou() == max(scores.values()) == scores[trained.step] > 0.8
    losses = [loss for _, loss in trained.curves.losses]
    assert losses[-1] < losses[0]
    # The file is the network that was scored.
    segmenter = decode_closed_set_segmenter(trained.segmenter, "here")
    images, labels = coloured_pairs(5, 2)
    confusion = ConfusionMatrix(3)
    confusion.add(labels, segmenter.labels(images))
    np.testing.assert_array_equal(confusion.counts, trained.confusion.counts)
    assert segmenter.label_space == _SPACE


def test_the_score_is_that_of_the_file_for_any_training_precision():
    # After three steps the scores of many pixels are so close that bf16 would change the class.
    recipe = _recipe(steps=3, eval_every=1, precision="bf16")
    trained = train_segmenter(recipe, _data(), 0)
    segmenter = decode_closed_set_segmenter(trained.segmenter, "here")
    images, labels = coloured_pairs(5, 2)
    confusion = ConfusionMatrix(3)
    confusion.add(labels, segmenter.labels(images))
    assert trained.step > 0
    assert confusion.miou() == dict(trained.curves.scores)[trained.step] < 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_a_killed_run_resumes_to_the_same_bytes(precision, optimiser):
    recipe = _recipe(precision=precision, optimiser=optimiser)
    alone = train_segmenter(recipe, _data(), 7)
    checkpoints = _Checkpoints(until=8)
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(recipe, _data(), 7, checkpoints.context())
    checkpoints.until = 16
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(recipe, _data(), 7, checkpoints.context())
    resumed = train_segmenter(recipe, _data(), 7, checkpoints.context())
    assert resumed.segmenter == alone.segmenter
    assert resumed.curves == alone.curves
    # A finished run is not trained again.
    checkpoints.until = None
    again = train_segmenter(recipe, _data(), 7, checkpoints.context())
    assert again.segmenter == alone.segmenter
    assert checkpoints.steps == [8, 16, 24]


def test_seed_and_ratio_matter():
    files = {
        train_segmenter(_recipe(steps=3, **changes), data, seed).segmenter
        for changes, data, seed in [
            ({}, _data(), 0),
            ({}, _data(), 1),
            ({}, _data(synthetic=False), 0),
            ({"synthetic_share": 1.0}, _data(), 0),
            ({"rare_weight": 5.0, "rare_share": 1.0}, _data(), 0),
        ]
    }
    # The last one weights all classes equally, which changes nothing.
    assert len(files) == 4


def test_control_does_not_depend_on_the_synthetic_data():
    control = train_segmenter(_recipe(steps=3, synthetic_share=0.0), _data(), 0)
    alone = train_segmenter(_recipe(steps=3), _data(synthetic=False), 0)
    assert control.segmenter == alone.segmenter


def test_data_loader_processes_change_nothing():
    one = train_segmenter(_recipe(steps=4), _data(), 0)
    two = train_segmenter(_recipe(steps=4), _data(), 0, TrainingContext(num_workers=1))
    assert one.segmenter == two.segmenter


def test_torchs_global_state_is_restored():
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train_segmenter(_recipe(steps=2, threads=threads + 1), _data(), 0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


def test_unlabelled_validation_selects_the_last_checkpoint():
    images, labels = coloured_pairs(2, 2)
    val = ArrayPairs(list(images), list(np.full_like(labels, 255)))
    data = dataclasses.replace(_data(), val=val)
    trained = train_segmenter(_recipe(), data, 0)
    assert trained.step == 24
    assert all(math.isnan(score) for _, score in trained.curves.scores)


def test_validation_images_may_differ_in_size():
    images, labels = coloured_pairs(4, 2, side=20)
    images, labels = list(images), list(labels)
    images[1], labels[1] = images[1][:7, :13], labels[1][:7, :13]
    data = dataclasses.replace(_data(), val=ArrayPairs(images, labels))
    trained = train_segmenter(_recipe(steps=2), data, 0)
    assert trained.confusion.counts.sum() == sum(label.size for label in labels)


def test_an_infinite_loss_is_an_error():
    with pytest.raises(StageError, match="the loss is"):
        train_segmenter(_recipe(learning_rate=1e30, clip_norm=None, warmup_steps=0), _data(), 0)


def test_foreign_checkpoints_are_refused():
    other = _Checkpoints()
    train_segmenter(_recipe(steps=2, network={"width": 16}), _data(), 0, other.context())
    with pytest.raises(IntegrityError, match="not of this training"):
        train_segmenter(_recipe(), _data(), 0, other.context())
    other.data = b"rubbish"
    with pytest.raises(IntegrityError, match="not of this training"):
        train_segmenter(_recipe(), _data(), 0, other.context())


def test_batch_norm_needs_two_images_per_worker():
    recipe = _recipe(network={"name": "deeplabv3plus-r101", "backbone": "resnet18"}, batch_size=1)
    with pytest.raises(ConfigError, match="at least 2 images per worker"):
        train_segmenter(recipe, _data(), 0)


@pytest.mark.parametrize(
    "network",
    [
        {"name": "deeplabv3plus-r101", "backbone": "resnet18", "width": 8},
        {"name": "mask2former-swin-b", "backbone": "swin-nano", "width": 32},
    ],
    ids=lambda network: network["name"],
)
def test_large_networks_train_and_resume(network):
    recipe = _recipe(network=network, steps=4, eval_every=2, batch_size=2, head_factor=10.0)
    alone = train_segmenter(recipe, _data(), 0)
    checkpoints = _Checkpoints(until=2)
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(recipe, _data(), 0, checkpoints.context())
    checkpoints.until = None
    assert train_segmenter(recipe, _data(), 0, checkpoints.context()).segmenter == alone.segmenter


def test_rates_follow_the_schedule_by_group(monkeypatch):
    seen = []
    original = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        seen.append([group["lr"] for group in self.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    recipe = _recipe(
        network={"name": "deeplabv3plus-r101", "backbone": "resnet18", "width": 8},
        steps=3,
        optimiser="sgd",
        learning_rate=0.5,
        head_factor=10.0,
        schedule="poly",
        warmup_steps=0,
    )
    train_segmenter(recipe, _data(), 0)
    expected = [[0.5 * (1 - s / 3) ** 0.9, 5 * (1 - s / 3) ** 0.9] for s in range(3)]
    np.testing.assert_allclose(seen, expected, rtol=1e-12)


def test_cosine_and_warm_up():
    recipe = _recipe(steps=100, warmup_steps=10)
    shares = [lr_factor(recipe, step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1, rel=1e-3)
    assert shares[50] == pytest.approx(0.02 + 0.98 / 2)
    assert 0.02 < shares[99] < 0.021


@pytest.mark.parametrize("name", SEGMENTER_RECIPES)
def test_recipes_by_name_take_overrides(name):
    assert named_segmenter_recipe(name) == SEGMENTER_RECIPES[name]
    assert named_segmenter_recipe(name, {"steps": 5}).steps == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"synthetic_share": 1.5},
        {"learning_rate": 0},
        {"learning_rate": math.nan},
        {"scales": [2.0, 1.0]},
        {"betas": [0.9, 1.0]},
        {"weight_decay": -1},
        {"clip_norm": 0},
        {"shortest_edge": 0},
        {"network": {"name": "other"}},
        {"unknown": 1},
    ],
)
def test_values_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        named_segmenter_recipe("unet-miniature", changes)
    with pytest.raises(ConfigError, match="known: unet-miniature"):
        named_segmenter_recipe("other")


def test_the_matchmask_recipe_is_that_of_unimatch():
    recipe = SEGMENTER_RECIPES["matchmask-voc"]
    assert (recipe.network.name, recipe.crop, recipe.optimiser) == (
        "deeplabv3plus-r101",
        321,
        "sgd",
    )
    assert (recipe.learning_rate, recipe.head_factor, recipe.synthetic_share) == (1e-3, 10, 0.5)


def test_evaluation_restores_training_mode(monkeypatch):
    modes = []
    original = loop._LossModule.forward
    monkeypatch.setattr(
        loop._LossModule,
        "forward",
        lambda self, *a: modes.append(self.network.training) or original(self, *a),
    )
    train_segmenter(_recipe(steps=10), _data(), 0)
    assert modes == [True] * 10
