"""Merged weights against float64 and peft's merge; the original parameters are restored."""

import copy

import peft
import pytest
import torch
from torch import nn

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.peft_io import load_adapter
from loraseg.errors import AdapterMismatchError, StageError
from loraseg.fuse import AdapterBank, fuse, merged
from loraseg.train.core.lora import apply_lora, init_pairs

SHAPES = {"a": (6, 4), "b": (5, 6)}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Two()


def adapter(name, layers=SHAPES, rank=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    pairs = {}
    for layer in layers:
        d_out, d_in = SHAPES[layer]
        down, up = (
            torch.randn(shape, generator=generator, dtype=dtype)
            for shape in ((rank, d_in), (d_out, rank))
        )
        pairs[layer] = LoraPair(down, up, 0.5)
    return Adapter(name=name, pairs=pairs, digest=name)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_weights_are_the_exact_sum_rounded_once(model, dtype, tolerance):
    model.to(dtype)
    stored = torch.promote_types(dtype, torch.float32)
    adapters = [
        adapter("x", dtype=stored),
        adapter("yy", rank=3, dtype=stored),
        adapter("z", layers=("b",), dtype=stored),
    ]
    weights = [1.0, -2.0, 3.0]
    exact = {layer: model.get_submodule(layer).weight.double() for layer in SHAPES}
    for adapter_, weight in zip(adapters, weights, strict=True):
        for layer, pair in adapter_.pairs.items():
            exact[layer] = exact[layer] + weight * 0.5 * (pair.up.double() @ pair.down.double())
    with merged(model, fuse(adapters, weights)):
        for layer, expected in exact.items():
            got = model.get_submodule(layer).weight
            assert got.dtype == dtype
            assert not got.requires_grad
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
            if dtype == torch.bfloat16:  # product and sum are not rounded separately
                assert (got == expected.float().to(dtype)).float().mean() > 0.95


def test_equals_the_merge_of_peft(model, tmp_path):
    wrapped = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["a", "b"], init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path)
    one = load_adapter(tmp_path)
    x = torch.randn(7, 4)
    with merged(model, fuse([one], [1.0])), torch.no_grad():
        got = model(x)
    torch.testing.assert_close(got, wrapped.merge_and_unload()(x).detach(), rtol=1e-5, atol=1e-6)


def test_the_same_parameters_are_restored_even_after_an_error(model):
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        merged(model, fuse([adapter("x")], [1.0])),
    ):
        model(torch.randn(1, 3))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert all(p.requires_grad for p in after.values())
    assert list(after) == list(before)
    with merged(model, None):
        assert model.a.weight is before["a.weight"]


def test_simultaneous_use_of_two_mixes_is_refused(model):
    one, two = fuse([adapter("x")], [1.0]), fuse([adapter("yy")], [1.0])
    bank = AdapterBank(model)
    with (
        pytest.raises(StageError, match=r"layer a: other adapters are in use"),
        merged(model, one),
        merged(model, two),
    ):
        pass
    with pytest.raises(StageError, match="other adapters"), bank.use([one]), merged(model, two):
        pass
    with pytest.raises(StageError, match="other adapters"), merged(model, one), bank.use([two]):
        pass
    with bank.use([two]), torch.no_grad():  # nothing is left of the refused mixes
        model(torch.randn(1, 4))


def test_pairs_can_train_on_merged_weights(model):
    """A frozen adapter is active while another one trains."""
    pairs = init_pairs(model, ["a"], rank=2, alpha=2.0, seed=0)
    with merged(model, fuse([adapter("x")], [1.0])), apply_lora(model, pairs):
        model(torch.randn(3, 4)).square().mean().backward()
    assert pairs.pairs["a"][1].grad.abs().max() > 0
    assert model.a.weight.grad is None


def test_adapters_that_do_not_fit_change_nothing(model):
    before = model.a.weight
    odd = Adapter(name="q", pairs={"c": adapter("x").pairs["a"]}, digest="q")
    with (
        pytest.raises(AdapterMismatchError, match="no linear layer"),
        merged(model, fuse([adapter("x"), odd], [1.0, 1.0])),
    ):
        pass
    assert model.a.weight is before
