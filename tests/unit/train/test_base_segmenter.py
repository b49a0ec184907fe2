import dataclasses

import pytest
import torch

from loraseg.data.transforms import AugmentConfig
from loraseg.errors import ConfigError
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.segment.open_vocabulary.catseg.checkpoint import read_metadata
from loraseg.train.base_segmenter import BaseRecipe, BaseTrainingTask, train_base
from loraseg.train.core.loop import LoopConfig
from tests.tiny_training import write_domain
from tests.unit.train.tiny_files import write_base

RECIPE = BaseRecipe(
    learning_rate=1e-2,
    batch_size=2,
    augment=AugmentConfig(crop=16, shortest_edge=(16,)),
    loop=LoopConfig(steps=6, clip_norm=1.0, checkpoint_every=2),
)


class Interrupted(Exception):
    pass


@pytest.fixture
def task(tmp_path):
    write_domain(tmp_path / "fog", "fog")
    return BaseTrainingTask(
        output=str(tmp_path / "out" / "further.safetensors"),
        data=str(tmp_path / "fog"),
        base=str(write_base(tmp_path / "base.safetensors")),
        checkpoints=str(tmp_path / "checkpoints"),
        recipe=RECIPE,
    )


def weights(path):
    return load_base(str(path)).model.state_dict()


def test_the_unfrozen_parameters_train_and_the_header_stays(task):
    result = train_base(task)
    before, after = weights(task.base), weights(result.path)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    clip = {name for name in moved if ".clip_model." in name}
    assert clip
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in clip)
    assert any(name.startswith("upsample1") for name in moved)
    assert any(".transformer.head" in name for name in moved)
    old, new = load_base(task.base), load_base(result.path)
    assert torch.equal(old.tokenize(["sky"]), new.tokenize(["sky"]))
    assert set(result.metrics) == {"miou_base", "miou"}
    assert result.digest == new.digest != old.digest


def test_a_killed_run_gives_the_same_weights_and_a_finished_one_is_skipped(task, tmp_path):
    plain = dataclasses.replace(task, checkpoints=None, output=str(tmp_path / "plain.safetensors"))
    train_base(plain)

    def kill(progress):
        if progress.phase == "train" and progress.step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_base(task, kill)
    steps = []
    result = train_base(task, lambda progress: steps.append(progress.step))
    assert steps == [5, 6]
    assert not result.skipped
    expected, got = weights(plain.output), weights(task.output)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    again = train_base(task, kill)
    assert (again.skipped, again.digest, again.metrics) == (True, result.digest, result.metrics)
    assert '"task_digest"' in read_metadata(task.output)["training"]
    assert not train_base(dataclasses.replace(task, seed=1)).skipped


def test_frozen_clip_does_not_change(task):
    recipe = dataclasses.replace(RECIPE, clip="frozen")
    train_base(dataclasses.replace(task, recipe=recipe))
    before, after = weights(task.base), weights(task.output)
    assert all(torch.equal(before[n], after[n]) for n in before if ".clip_model." in n)


def test_invalid_settings_are_refused():
    with pytest.raises(ConfigError, match=r"expected a file x\.safetensors"):
        BaseTrainingTask(output="x.pth", data="d")
    with pytest.raises(ConfigError, match="batch_size 0"):
        BaseRecipe(batch_size=0)
    with pytest.raises(ConfigError, match="learning_rate -1"):
        BaseRecipe(learning_rate=-1.0)
