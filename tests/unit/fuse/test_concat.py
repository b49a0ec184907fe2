import math

import numpy as np
import pytest
import torch

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.errors import AdapterMismatchError
from loraseg.fuse.concat import concat_lora
from loraseg.fuse.late import late_fusion
from loraseg.fuse.mix import fuse

SHAPES = {"a.q_proj": (7, 5), "a.mlp.0": (5, 9), "b.v": (4, 4)}  # d_in, d_out


def make_adapter(name, rank, alpha, modules=SHAPES, dtype=torch.float64, **flags):
    generator = torch.Generator().manual_seed(rank)
    pairs = {
        module: LoraPair(
            torch.randn(rank, SHAPES[module][0], generator=generator, dtype=dtype),
            torch.randn(SHAPES[module][1], rank, generator=generator, dtype=dtype),
            alpha / rank,
        )
        for module in modules
    }
    return Adapter(name=name, pairs=pairs, digest=name * 8, **flags)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.2, 0.3, 0.5), (-1.0, 2.0, 0.5)])
def test_product_equals_dense_weighted_sum(weights):
    generator = torch.Generator().manual_seed(0)
    downs = [torch.randn(r, 7, generator=generator, dtype=torch.float64) for r in (2, 3, 1)]
    ups = [torch.randn(5, r, generator=generator, dtype=torch.float64) for r in (2, 3, 1)]
    dense = sum(w * (b @ a) for w, a, b in zip(weights, downs, ups, strict=True))
    down, up = concat_lora(downs, ups, weights)
    assert down.shape == (6, 7)
    torch.testing.assert_close(up @ down, dense, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weights", [(0.1, 0.7, 0.2), (-0.5, 1.5, 3.0), (1.0, 0.0, 0.0)])
def test_mix_is_the_weighted_sum_of_scaled_products(weights):
    adapters = [
        make_adapter("x", 2, 16),
        make_adapter("y", 3, 4, modules=("a.q_proj", "b.v")),
        make_adapter("z", 1, 7, modules=("a.mlp.0", "b.v")),
    ]
    mix = fuse(adapters, weights)
    assert set(mix.pairs()) == set(SHAPES)
    for module, (down, up) in mix.pairs().items():
        expected = torch.zeros(up.shape[0], down.shape[1], dtype=torch.float64)
        for adapter, weight in zip(adapters, weights, strict=True):
            if module in adapter.pairs:
                pair = adapter.pairs[module]
                expected += weight * pair.scale * torch.einsum("or,ri->oi", pair.up, pair.down)
        torch.testing.assert_close(up @ down, expected, rtol=0, atol=1e-10)


def test_digests_depend_on_weights_and_order():
    x, y = make_adapter("x", 2, 2), make_adapter("y", 2, 2)
    digests = {
        fuse([x, y], [0.4, 0.6]).digest,
        fuse([x, y], [0.4, 0.6000000000000001]).digest,
        fuse([y, x], [0.4, 0.6]).digest,
        fuse([x], [1.0]).digest,
    }
    assert len(digests) == 4
    assert fuse([x, y], [0.4, 0.6]).digest == fuse([x, y], np.array([0.4, 0.6])).digest


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ("head",)}, "head"),
    ],
)
def test_refuses_adapters_that_are_not_plain_lora(flags, reason):
    with pytest.raises(AdapterMismatchError, match=f"'odd': cannot be fused.*{reason}"):
        fuse([make_adapter("x", 2, 2), make_adapter("odd", 2, 2, **flags)], [0.5, 0.5])


def test_refuses_different_bases_but_not_unknown_ones():
    one = make_adapter("x", 2, 2, base_digest="1" * 64)
    other = make_adapter("y", 2, 2, base_digest="2" * 64)
    unknown = make_adapter("z", 2, 2)
    fuse([unknown, one], [0.5, 0.5])
    with pytest.raises(AdapterMismatchError, match=r"'y': trained on base 222.*expected 111"):
        fuse([unknown, one, other], [0.2, 0.4, 0.4])


@pytest.mark.parametrize("weights", [[], [0.5], [0.1, 0.2, 0.7]])
def test_refuses_unequal_counts(weights):
    adapters = [make_adapter("x", 2, 2), make_adapter("y", 2, 2)]
    with pytest.raises(AdapterMismatchError, match=f"2 adapters, {len(weights)} weights"):
        fuse(adapters, weights)
    with pytest.raises(AdapterMismatchError, match=r"got 1 downs, 0 ups, 1 weights"):
        concat_lora([torch.ones(1, 2)], [], [1.0])
    with pytest.raises(AdapterMismatchError, match="0 adapters"):
        fuse([], [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_non_finite_weights(bad):
    with pytest.raises(AdapterMismatchError, match="weight 1: got"):
        fuse([make_adapter("x", 2, 2), make_adapter("y", 2, 2)], [0.5, bad])


def test_refuses_shapes_that_differ_between_adapters():
    odd = Adapter(
        name="odd",
        pairs={"a.q_proj": LoraPair(torch.ones(2, 6).double(), torch.ones(5, 2).double(), 1.0)},
        digest="0",
    )
    with pytest.raises(AdapterMismatchError, match=r"adapter 1: down \(2, 6\)"):
        fuse([make_adapter("x", 2, 2), odd], [0.5, 0.5]).pairs()


def test_stock_peft_cat_gives_the_same_factors():
    peft = pytest.importorskip("peft")
    layers = {"q": torch.nn.Linear(7, 5), "v": torch.nn.Linear(5, 6)}
    model = torch.nn.Sequential(torch.nn.ModuleDict(layers))
    config = {"target_modules": ["q", "v"], "init_lora_weights": False}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **config), "one")
    wrapped.add_adapter("two", peft.LoraConfig(r=2, lora_alpha=6, **config))
    wrapped.add_weighted_adapter(["one", "two"], [0.3, 0.7], "cat", combination_type="cat")

    def ours(name):
        pairs = {}
        for path, module in wrapped.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A[name].weight, module.lora_B[name].weight
                pairs[path] = LoraPair(down.detach(), up.detach(), module.scaling[name])
        return Adapter(name=name, pairs=pairs, digest=name)

    theirs = ours("cat")
    mix = fuse([ours("one"), ours("two")], [0.3, 0.7])
    assert set(mix.pairs()) == set(theirs.pairs) == {"0.q", "0.v"}
    for module, (down, up) in mix.pairs().items():
        torch.testing.assert_close(up @ down, theirs.pairs[module].delta(), rtol=0, atol=1e-5)
        parts = [
            (ours(name).pairs[module], weight) for name, weight in (("one", 0.3), ("two", 0.7))
        ]
        factors = concat_lora(
            [pair.down for pair, _ in parts],
            [pair.up for pair, _ in parts],
            [weight * pair.scale for pair, weight in parts],
        )
        torch.testing.assert_close(factors[0], theirs.pairs[module].down, rtol=0, atol=1e-6)


def test_late_fusion_is_the_weighted_sum():
    maps = [torch.rand(3, 4, 5, dtype=torch.float64) for _ in range(3)]
    expected = torch.einsum(
        "i,icyx->cyx", torch.tensor([0.2, 0.5, 0.3]).double(), torch.stack(maps)
    )
    fused = late_fusion(maps, [0.2, 0.5, 0.3])
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-7)
    assert 0 <= fused.min() <= fused.max() <= 1
    with pytest.raises(AdapterMismatchError, match=r"score map: got shape \(2,"):
        late_fusion([maps[0], maps[0][:2]], [0.5, 0.5])
    with pytest.raises(AdapterMismatchError, match="3 adapters, 2 weights"):
        late_fusion(maps, [0.5, 0.5])
