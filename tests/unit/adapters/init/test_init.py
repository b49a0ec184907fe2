"""The table of initialisers, and what every entry must satisfy."""

import pytest
import torch
from torch import nn

from loraseg.adapters.init import INITIALISERS, init_lora
from loraseg.seeding import torch_generator


def small_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(7, 5), "second": nn.Linear(5, 3, bias=False)})


@pytest.mark.parametrize("name", INITIALISERS)
def test_adapted_layers_compute_what_the_base_computes(name):
    model = small_model()
    initial = INITIALISERS[name](model, ["first", "second"], rank=2, alpha=6.0, seed=3)
    assert list(initial.pairs) == ["first", "second"]
    grouped = [module for group in initial.groups for module in group.modules]
    assert sorted(grouped) == sorted(initial.pairs)
    for module, (down, up) in initial.pairs.items():
        weight = model[module].weight
        assert down.shape == (2, weight.shape[1])
        assert up.shape == (weight.shape[0], 2)
        residual = initial.residual.get(module, weight)
        torch.testing.assert_close(residual + initial.scale * up @ down, weight)


def test_lora_draws_each_module_from_its_own_stream():
    model = small_model()
    alone = init_lora(model, ["second"], rank=4, alpha=8.0, seed=3)
    both = init_lora(model, ["first", "second"], rank=4, alpha=8.0, seed=3)
    assert torch.equal(alone.pairs["second"][0], both.pairs["second"][0])
    unit = torch.rand((4, 5), generator=torch_generator(3, "lora", "second"))
    expected = (2 * unit - 1) / 5**0.5
    torch.testing.assert_close(both.pairs["second"][0], expected, rtol=0, atol=1e-7)
    assert both.scale == 2.0
    assert not both.residual
