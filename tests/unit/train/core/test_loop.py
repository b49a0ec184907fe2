import math

import pytest
import torch
from torch import nn

from loraseg.errors import ConfigError, StageError
from loraseg.storage import open_store
from loraseg.train.core.checkpoint import CheckpointStore, TrainingSnapshot
from loraseg.train.core.loop import (
    AveragingLoopConfig,
    LoopConfig,
    TrainingLoop,
    lr_factor,
    run_loop,
)
from tests.unit.train.interruption import Interrupted, interrupt_at

CONFIG = LoopConfig(steps=12, warmup_steps=3, clip_norm=0.5, checkpoint_every=4)


class Problem:
    """A small regression whose batch depends on the step only."""

    def __init__(self, skip=()):
        self.layer = nn.Linear(3, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(6.0).view(2, 3) / 10)
            self.layer.bias.zero_()
        self.parameters = dict(self.layer.named_parameters())
        self.groups = [{"params": list(self.layer.parameters()), "lr": 0.1, "weight_decay": 0.01}]
        self.skip = skip
        self.seen = []

    def loss_of(self, step):
        self.seen.append(step)
        if step in self.skip:
            return None
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        return (self.layer(x) - x[:, :2] ** 2).square().mean()

    def run(self, config=CONFIG, **options):
        return run_loop(self.parameters, self.groups, self.loss_of, config, **options)

    def state(self):
        return torch.cat([p.detach().flatten() for p in self.layer.parameters()])


def test_matches_adamw_written_out():
    problem = Problem()
    problem.run()
    oracle = Problem()
    values = [p.detach().clone().double() for p in oracle.layer.parameters()]
    first, second = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
    for step in range(12):
        with torch.no_grad():
            for parameter, value in zip(oracle.layer.parameters(), values, strict=True):
                parameter.copy_(value)
        loss = oracle.loss_of(step)
        gradients = [g.double() for g in torch.autograd.grad(loss, list(oracle.layer.parameters()))]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        cosine = 0.5 * (1 + math.cos(math.pi * step / 12))
        at_end = 0.5 * (1 + math.cos(math.pi * 3 / 12))
        rate = 0.1 * (cosine if step >= 3 else 0.01 + (at_end - 0.01) * step / 3)
        for i, gradient in enumerate(gradients):
            gradient = gradient * min(1.0, 0.5 / (norm + 1e-6))
            values[i] = values[i] * (1 - rate * 0.01)
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            mean, square = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.999 ** (step + 1))
            values[i] = values[i] - rate * mean / (square.sqrt() + 1e-8)
    expected = torch.cat([v.flatten() for v in values]).float()
    torch.testing.assert_close(problem.state(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kills", [(1,), (4,), (5, 7), (9, 9, 10), (11,)])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, kills):
    whole = Problem(skip=(2,))
    plain = whole.run()
    slot = CheckpointStore(open_store(str(tmp_path)))
    for step in kills:
        with pytest.raises(Interrupted):
            Problem(skip=(2,)).run(checkpoints=slot, on_step=interrupt_at(step))
    last = Problem(skip=(2,))
    result = last.run(checkpoints=slot)
    assert torch.equal(last.state(), whole.state())
    assert result.loss == plain.loss
    assert result.skipped_batches == 1
    assert result.resumed_from_step == max(kills) // 4 * 4 == last.seen[0]


def test_checkpoints_do_not_change_the_result_and_only_the_last_stays(tmp_path):
    store = open_store(str(tmp_path))
    slot = CheckpointStore(store)
    with_slot, without = Problem(), Problem()
    with_slot.run(checkpoints=slot)
    without.run()
    assert torch.equal(with_slot.state(), without.state())
    assert list(store.list()) == ["000000012.safetensors", "latest.json"]
    slot.clear()
    assert list(store.list()) == []
    assert slot.load() is None


def test_a_slow_worker_does_not_replace_a_newer_checkpoint(tmp_path):
    slot = CheckpointStore(open_store(str(tmp_path)))
    ahead, behind = (
        TrainingSnapshot(step, 0, {"value/w": torch.ones(1) * step}) for step in (40, 20)
    )
    slot.save(ahead)
    slot.save(behind)
    assert slot.load().step == 40


def test_a_finished_run_is_not_run_again(tmp_path):
    slot = CheckpointStore(open_store(str(tmp_path)))
    whole, again = Problem(), Problem()
    whole.run(checkpoints=slot)
    assert again.run(checkpoints=slot).resumed_from_step == 12
    assert again.seen == []
    assert torch.equal(again.state(), whole.state())


@pytest.mark.parametrize("damage", ["truncate", "remove", "pointer"])
def test_a_damaged_checkpoint_starts_again(tmp_path, damage, caplog):
    slot = CheckpointStore(open_store(str(tmp_path)))
    Problem().run(checkpoints=slot)
    data = tmp_path / "000000012.safetensors"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "remove":
        data.unlink()
    else:
        (tmp_path / "latest.json").write_bytes(b"{")
    again, whole = Problem(), Problem()
    assert again.run(checkpoints=slot).resumed_from_step == 0
    whole.run()
    assert torch.equal(again.state(), whole.state())
    assert damage == "remove" or "starting again" in caplog.text


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    slot = CheckpointStore(open_store(str(tmp_path)))
    Problem().run(checkpoints=slot)
    other = Problem()
    other.parameters = {"weight": other.layer.weight}
    with pytest.raises(StageError, match="other parameters"):
        other.run(checkpoints=slot)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_infinite_loss_is_an_error(bad):
    problem = Problem()
    inner = problem.loss_of
    problem.loss_of = lambda step: inner(step) * (bad if step == 5 else 1.0)
    with pytest.raises(StageError, match="step 5: the loss is"):
        problem.run()


def test_an_infinite_gradient_is_an_error():
    problem = Problem()
    problem.loss_of = lambda step: problem.layer.weight.sum().sub(1.5).square().sqrt()
    with pytest.raises(StageError, match="step 0: the gradient norm is nan"):
        problem.run()


def test_skipped_batches_are_counted_and_may_not_be_all():
    losses = []
    result = Problem(skip=(0, 3)).run(on_step=lambda done, loss: losses.append(loss))
    assert result.skipped_batches == 2
    assert [math.isnan(loss) for loss in losses[:4]] == [True, False, False, True]
    with pytest.raises(StageError, match="all 12 batches held no labelled pixel"):
        Problem(skip=range(12)).run()


def test_rate_rises_linearly_and_falls_to_zero():
    factors = [lr_factor(LoopConfig(steps=100, warmup_steps=10), s) for s in range(100)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[5] == pytest.approx((0.01 + factors[10]) / 2)
    assert factors[50] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.5 * (1 - math.cos(math.pi / 100)))
    assert lr_factor(LoopConfig(steps=5, warmup_steps=10), 4) < 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"steps": 0}, "steps 0"),
        ({"steps": 1, "checkpoint_every": 0}, "checkpoint_every 0"),
        ({"steps": 1, "warmup_factor": 0.0}, "warmup_factor: got 0"),
        ({"steps": 1, "clip_norm": 0.0}, "clip_norm: got 0"),
    ],
)
def test_settings_out_of_range_are_refused(values, reason):
    with pytest.raises(ConfigError, match=reason):
        LoopConfig(**values)


AVERAGING = AveragingLoopConfig(
    steps=12, warmup_steps=3, clip_norm=0.5, checkpoint_every=4, schedule="constant", ema_decay=0.5
)


def test_the_average_is_the_one_written_out():
    seen, problem = [], Problem(skip=(2,))
    states = lambda done, loss: seen.append(problem.state().double())  # noqa: E731
    run = TrainingLoop(problem.parameters, problem.groups, AVERAGING, on_step=states)
    expected = problem.state().double()
    for step in range(12):
        run.step(step, problem.loss_of(step))
    for step, state in enumerate(seen):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = expected if step == 2 else decay * expected + (1 - decay) * state
    last = problem.state()
    with run.averaged():
        torch.testing.assert_close(problem.state().double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(problem.state(), last)
    assert not torch.equal(last.double(), expected)


@pytest.mark.parametrize("kills", [(1,), (5, 7), (11,)])
def test_a_killed_run_resumes_the_average_to_the_same_bits(tmp_path, kills):
    def averaged(problem, **options):
        run = TrainingLoop(problem.parameters, problem.groups, AVERAGING, **options)
        for step in range(run.first_step, AVERAGING.steps):
            run.step(step, problem.loss_of(step))
        with run.averaged():
            return problem.state()

    whole = averaged(Problem())
    slot = CheckpointStore(open_store(str(tmp_path)))
    for step in kills:
        with pytest.raises(Interrupted):
            averaged(Problem(), checkpoints=slot, on_step=interrupt_at(step))
    assert torch.equal(averaged(Problem(), checkpoints=slot), whole)


def test_a_checkpoint_without_the_average_is_refused(tmp_path):
    slot = CheckpointStore(open_store(str(tmp_path)))
    Problem().run(checkpoints=slot)
    with pytest.raises(StageError, match="other parameters"):
        Problem().run(AVERAGING, checkpoints=slot)


def test_a_loss_in_parts_is_their_sum():
    whole, parted = Problem(), Problem()
    losses = [], []
    inner = parted.loss_of
    parted.loss_of = lambda step: (inner(step) * share for share in (0.25, 0.5, 0.25))
    for problem, kept in zip((whole, parted), losses, strict=True):
        problem.run(on_step=lambda done, loss, kept=kept: kept.append(loss))
    torch.testing.assert_close(whole.state(), parted.state(), rtol=1e-6, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_constant_rate_stays_constant_after_the_warm_up():
    factors = [lr_factor(AVERAGING, step) for step in range(12)]
    assert factors[:3] == pytest.approx([0.01, 0.34, 0.67])
    assert factors[3:] == [1.0] * 9
    cosine = AveragingLoopConfig(steps=12, warmup_steps=3)
    plain = LoopConfig(steps=12, warmup_steps=3)
    assert [lr_factor(cosine, s) for s in range(12)] == [lr_factor(plain, s) for s in range(12)]


@pytest.mark.parametrize("decay", [0.0, 1.0, math.nan])
def test_decays_out_of_range_are_refused(decay):
    with pytest.raises(ConfigError, match="ema_decay: got"):
        AveragingLoopConfig(steps=1, ema_decay=decay)
