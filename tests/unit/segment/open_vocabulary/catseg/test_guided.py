"""Guided linear layers against nn.Linear on concatenated input."""

import pytest
import torch
from torch import nn

from loraseg.segment.open_vocabulary.catseg.guided import GuidedLinear, call_guided


def concatenate(x, guide):
    rows = [torch.cat([x[:, i], guide], dim=-1) for i in range(x.shape[1])]
    return torch.stack(rows, dim=1)


def make(positions, dtype=torch.float64):
    torch.manual_seed(0)
    layer = GuidedLinear(5 + 3, 4).to(dtype)
    x = torch.randn(2, 6, *positions, 5, dtype=dtype, requires_grad=True)
    guide = torch.randn(2, *positions, 3, dtype=dtype, requires_grad=True)
    return layer, x, guide


@pytest.mark.parametrize("positions", [(), (7,), (2, 3)])
def test_values_and_gradients_equal_those_of_the_concatenation(positions):
    layer, x, guide = make(positions)
    leaves = [x, guide, *layer.parameters()]
    plain = nn.functional.linear(concatenate(x, guide), layer.weight, layer.bias)
    split = layer(x, guide)
    torch.testing.assert_close(split, plain, rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(concatenate(x, guide)), plain, rtol=0, atol=0)
    seed = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, leaves, seed)
    got = torch.autograd.grad(split, leaves, seed)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_parameters_are_those_of_a_linear_layer():
    layer, _, _ = make(())
    plain = nn.Linear(8, 4).double()
    plain.load_state_dict(layer.state_dict())
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (8, 4)


def test_a_wrapper_gets_the_concatenated_input():
    layer, x, guide = make((7,))
    seen = []

    class Wrapper(nn.Module):
        def forward(self, inputs):
            seen.append(inputs)
            return layer(inputs)

    got = call_guided(Wrapper(), x, guide)
    torch.testing.assert_close(got, call_guided(layer, x, guide), rtol=0, atol=1e-14)
    torch.testing.assert_close(seen[0], concatenate(x, guide), rtol=0, atol=0)


def test_a_replaced_forward_gets_tokens_and_guide():
    layer, x, guide = make((7,))
    seen = []
    layer.forward = lambda *given: seen.append(given) or x
    call_guided(layer, x, guide)
    assert len(seen) == 1
    assert seen[0] == (x, guide)
