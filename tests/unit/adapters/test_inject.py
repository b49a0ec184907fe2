import pytest
import torch
from torch import nn

from loraseg.adapters.adapter import Adapter, LoraPair, Mix
from loraseg.adapters.inject import AdapterSlots, targets
from loraseg.errors import AdapterMismatchError, ConfigError, StageError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def pair(d_in, d_out, rank=2, scale=0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(d_in)
    return LoraPair(
        torch.randn(rank, d_in, generator=generator, dtype=dtype),
        torch.randn(d_out, rank, generator=generator, dtype=dtype),
        scale,
    )


def make_adapter(**pairs):
    named = {name.removeprefix("m"): value for name, value in pairs.items()}
    return Adapter(name="a", pairs=named, digest="d")


def test_acts_like_the_dense_correction_and_leaves_no_trace(model):
    adapter = make_adapter(m0=pair(4, 6), m2=pair(6, 3))
    dense = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, one in adapter.pairs.items():
            dense.get_submodule(name).weight += one.scale * one.up @ one.down
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    before, weights = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    slots = AdapterSlots(model)
    mix = Mix((("d", 1.0),), {n: (p.scale * p.down, p.up) for n, p in adapter.pairs.items()})
    for given in (adapter, mix):
        with slots.use(given):
            torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-12)
        assert torch.equal(model(x), before)
    with slots.use(None):
        assert torch.equal(model(x), before)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_restores_the_base_after_an_exception(model):
    slots, x = AdapterSlots(model), torch.ones(1, 4, dtype=torch.float64)
    before = model(x)
    with pytest.raises(RuntimeError, match="inside"), slots.use(make_adapter(m0=pair(4, 6))):
        raise RuntimeError("inside")
    assert torch.equal(model(x), before)
    with slots.use(make_adapter(m0=pair(4, 6))):
        pass


def test_float32_pairs_serve_a_model_of_another_type(model):
    with AdapterSlots(model.float()).use(make_adapter(m0=pair(4, 6))):
        assert model(torch.ones(1, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ({"m1": pair(4, 6)}, "module '1': the model has no linear layer"),
        (
            {"m0": pair(5, 6)},
            r"module '0': got an adapter for a weight \(6, 5\), expected \(6, 4\)",
        ),
        ({"m0": pair(4, 6), "m2": pair(6, 4)}, r"module '2': got .* \(4, 6\), expected \(3, 6\)"),
    ],
)
def test_refuses_what_does_not_fit_and_adds_nothing(model, pairs, reason):
    x = torch.ones(1, 4, dtype=torch.float64)
    before = model(x)
    slots = AdapterSlots(model)
    with pytest.raises(AdapterMismatchError, match=reason), slots.use(make_adapter(**pairs)):
        pass
    assert torch.equal(model(x), before)


def test_refuses_two_mixes_at_once_and_adapters_beyond_pairs(model):
    slots, adapter = AdapterSlots(model), make_adapter(m0=pair(4, 6))
    with slots.use(adapter), pytest.raises(StageError, match="in use"), slots.use(None):
        pass
    dora = Adapter(name="d", pairs=adapter.pairs, digest="d", use_dora=True)
    with pytest.raises(AdapterMismatchError, match="'d': cannot be used, it has DoRA"):
        slots.use(dora).__enter__()


def nested(names):
    """A module tree with a Linear at every dotted name."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(1, 1))
    return root


def test_targets_follow_the_list_of_methods_b1():
    head = "sem_seg_head.predictor."
    block = ("mlp.c_fc", "mlp.c_proj", "attn.q_proj", "attn.k_proj", "attn.v_proj")
    wanted = [
        f"{head}clip_model.{tower}transformer.resblocks.{i}.{layer}"
        for tower in ("visual.", "")
        for i in (0, 11)
        for layer in block
    ]
    swin = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    wanted += [f"{head}transformer.layers.1.swin_block.block_{b}.{x}" for b in (1, 2) for x in swin]
    attention = ("attention.q", "attention.k", "attention.v", "MLP.0", "MLP.2")
    wanted += [f"{head}transformer.layers.1.attention.{x}" for x in attention]
    others = [
        f"{head}clip_model.transformer.resblocks.0.attn.out_proj",
        f"{head}transformer.text_guidance_projection.0",
        f"{head}transformer.layers.1.attention.MLP.1",
        "other.transformer.resblocks.0.mlp.c_fc",
    ]
    assert set(targets(nested([*wanted, *others]))) == set(wanted)


def test_targets_refuse_an_unknown_rule_and_another_model(model):
    with pytest.raises(ConfigError, match=r"unknown rule 'all' \(known: semla\)"):
        targets(model, "all")
    with pytest.raises(AdapterMismatchError, match="names no linear layer of Sequential"):
        targets(model)
