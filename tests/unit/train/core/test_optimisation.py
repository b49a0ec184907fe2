"""The update that all training loops share."""

import math

import pytest
import torch
from torch import nn

from loraseg.train.core.optimisation import OptimiserStep, is_due


def made(weight, clip_norm, *, rates=(0.5, 0.25)):
    """An SGD step over two parameters, each in a group of its own."""
    first, second = (nn.Parameter(torch.tensor(weight, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [p], "lr": lr} for p, lr in zip((first, second), rates, strict=True)]
    step = OptimiserStep(
        torch.optim.SGD(groups), [first, second], lambda peak, s: peak / s, clip_norm=clip_norm
    )
    return step, first, second


@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
def test_an_update_is_plain_sgd_on_clipped_gradients(clip_norm):
    step, first, second = made(1.0, clip_norm)
    norms = []
    step.update(2, 3 * first + 4 * second, norms.append)
    share = 1.0 if clip_norm is None else min(1.0, clip_norm / (5 + 1e-6))
    assert first.item() == pytest.approx(1 - 0.5 / 2 * 3 * share, abs=1e-12)
    assert second.item() == pytest.approx(1 - 0.25 / 2 * 4 * share, abs=1e-12)
    assert [float(norm) for norm in norms] == ([] if clip_norm is None else [pytest.approx(5.0)])


def test_parts_of_a_loss_add_up_and_are_computed_one_at_a_time():
    whole, parts = made(1.0, 1.0), made(1.0, 1.0)
    graphs = []

    def losses():
        for factor in (1, 2):
            graphs.append(parts[1].grad is not None)
            yield factor * (parts[1] + parts[2])

    whole[0].update(1, 3 * (whole[1] + whole[2]))
    parts[0].update(1, losses())
    assert graphs == [False, True]
    assert [p.item() for p in parts[1:]] == pytest.approx([p.item() for p in whole[1:]])


def test_a_failed_check_leaves_the_parameters():
    step, first, second = made(1.0, 1.0)

    def refuse(norm):
        raise ArithmeticError(float(norm))

    with pytest.raises(ArithmeticError, match="nan"):
        step.update(1, math.nan * first + second, refuse)
    assert (first.item(), second.item()) == (1.0, 1.0)


def test_periodic_work_is_due_after_the_last_step_too():
    assert [done for done in range(1, 8) if is_due(done, 3, 7)] == [3, 6, 7]
