"""The attention projections against known counts for the public UNets."""

from collections import Counter

import peft
import pytest
import torch
from torch import nn

from loraseg.adapters.targets.unet import (
    SELECTION_RULES,
    alpha_modules,
    attention_projections,
    select_projections,
)
from loraseg.errors import AdapterMismatchError, ConfigError
from tests.unit.tiny_diffusion import full_unet, tiny_sd

MODELS = ("sd1.4", "sd2.1", "sdxl")
_SD = {"down_blocks.0": 8, "down_blocks.1": 8, "down_blocks.2": 8, "mid_block": 4}
_SD |= {"up_blocks.1": 12, "up_blocks.2": 12, "up_blocks.3": 12}
_XL = {"down_blocks.1": 16, "down_blocks.2": 80, "mid_block": 40}
_XL |= {"up_blocks.0": 120, "up_blocks.1": 24}
# Model: parameters, projections, their weights, rank-4 LoRA values of all, self, cross.
TABLE = {
    "sd1.4": (859_520_964, 128, 93_511_680, 797_184, 399_360, 397_824),
    "sd2.1": (865_910_724, 128, 99_901_440, 829_952, 399_360, 430_592),
    "sdxl": (2_567_463_684, 560, 955_187_200, 5_806_080, 2_662_400, 3_143_680),
}
PER_BLOCK = {"sd1.4": _SD, "sd2.1": _SD, "sdxl": _XL}
MATCHMASK = {"sd1.4": (706_560, 4_810), "sd2.1": (788_480, 4_810), "sdxl": (1_269_760, 6_410)}


@pytest.fixture(scope="module")
def unets():
    return {name: full_unet(name) for name in MODELS}


def lora_size(unet, names, rank):
    modules = dict(unet.named_modules())
    return sum(
        rank * (modules[name].in_features + modules[name].out_features) for name in set(names)
    )


@pytest.mark.parametrize("model", MODELS)
def test_counts_of_the_public_models(unets, model):
    unet = unets[model]
    projections = attention_projections(unet)
    weights = sum(unet.get_submodule(p.name).weight.numel() for p in projections)
    sizes = [
        lora_size(unet, select_projections(unet, rule), 4) for rule in ("all", "self", "cross")
    ]
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert (parameters, len(projections), weights, *sizes) == TABLE[model]


@pytest.mark.parametrize("model", MODELS)
def test_names_are_in_model_order(unets, model):
    suffixes = tuple(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v"))
    suffixes += ("attn1.to_out.0", "attn2.to_out.0")
    expected = [name for name, _ in unets[model].named_modules() if name.endswith(suffixes)]
    assert [projection.name for projection in attention_projections(unets[model])] == expected


@pytest.mark.parametrize("model", MODELS)
def test_blocks_have_equally_many_self_and_cross_projections(unets, model):
    counts = Counter((p.block, p.cross) for p in attention_projections(unets[model]))
    expected = {(block, x): n for block, n in PER_BLOCK[model].items() for x in (True, False)}
    assert counts == expected


@pytest.mark.parametrize("model", MODELS)
def test_fields_agree_with_the_modules(unets, model):
    width_of = unets[model].config.cross_attention_dim
    for projection in attention_projections(unets[model]):
        layer = unets[model].get_submodule(projection.name)
        assert (projection.d_in, projection.d_out) == (layer.in_features, layer.out_features)
        assert projection.name.startswith(f"{projection.attention}.to_{projection.part}")
        assert projection.attention.startswith(projection.block + ".attentions.")
        assert projection.cross == projection.attention.endswith("attn2")
        text_side = projection.cross and projection.part in ("k", "v")
        assert (projection.d_in == width_of) == text_side


@pytest.mark.parametrize(
    ("model", "factors"),
    [
        ("sd1.4", {"down_blocks.0": 1, "down_blocks.1": 2, "down_blocks.2": 4, "mid_block": 8}),
        ("sd2.1", {"up_blocks.1": 4, "up_blocks.2": 2, "up_blocks.3": 1}),
        ("sdxl", {"down_blocks.1": 2, "down_blocks.2": 4, "mid_block": 4, "up_blocks.1": 2}),
    ],
)
def test_factor_is_latent_side_over_block_side(unets, model, factors):
    factor_of = {p.block: p.factor for p in attention_projections(unets[model])}
    assert {block: factor_of[block] for block in factors} == factors


def test_factors_agree_with_the_inputs_of_the_modules():
    unet = tiny_sd().unet
    seen = {}

    def watch(name):
        def hook(module, args, kwargs):
            seen[name] = (args[0] if args else kwargs["hidden_states"]).shape[1]

        return hook

    factor_of = {p.attention: p.factor for p in attention_projections(unet)}
    for name in factor_of:
        unet.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
    with torch.no_grad():
        unet(torch.zeros(1, 4, 16, 8), 1, torch.zeros(1, 77, 16))
    assert seen == {name: 16 * 8 // factor**2 for name, factor in factor_of.items()}
    assert set(factor_of.values()) == {1, 2}


@pytest.mark.parametrize("model", MODELS)
def test_matchmask_preset(unets, model):
    unet = unets[model]
    names = select_projections(unet, "matchmask")
    modules = alpha_modules(unet, names)
    alphas = sum(unet.get_submodule(name).to_q.in_features + 1 for name in modules)
    assert (lora_size(unet, names, 16), alphas) == MATCHMASK[model]
    assert (len(names), len(modules)) == (40, 10)


def test_cross_attention_is_not_detected_by_name():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        only_cross_attention=(True, False),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=16,
    )
    projections = attention_projections(unet)
    upper = [p for p in projections if p.block in ("down_blocks.0", "up_blocks.1")]
    assert all(p.cross for p in upper)
    assert any(p.attention.endswith("attn1") for p in upper)
    assert any(not p.cross for p in projections)
    assert set(alpha_modules(unet, [p.name for p in upper])) == {p.attention for p in upper}


def test_alpha_modules_are_those_of_selected_cross_attention(unets):
    unet = unets["sd1.4"]
    block = "down_blocks.0.attentions.1.transformer_blocks.0"
    names = [f"{block}.attn2.to_v", f"{block}.attn1.to_q", "time_embedding.linear_1"]
    assert alpha_modules(unet, names) == (f"{block}.attn2",)
    with pytest.raises(
        AdapterMismatchError, match=r"has no module 'nowhere' \(1 of 2 are unknown\)"
    ):
        alpha_modules(unet, [names[0], "nowhere"])


def test_wrapped_layers_keep_their_names():
    unet = tiny_sd().unet
    before = attention_projections(unet)
    names = select_projections(unet, "matchmask")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=list(names)), "own")
    assert attention_projections(unet) == before


def test_unknown_rules_and_models_are_refused():
    unet = tiny_sd().unet
    with pytest.raises(ConfigError, match=r"unknown rule 'best' \(known: all, cross, self, match"):
        select_projections(unet, "best")
    with pytest.raises(AdapterMismatchError, match="has no down_blocks and up_blocks"):
        attention_projections(nn.Linear(2, 2))
    blind = nn.Module()
    blind.down_blocks, blind.up_blocks = nn.ModuleList(), nn.ModuleList()
    with pytest.raises(AdapterMismatchError, match="has no attention projection"):
        attention_projections(blind)
    assert set(SELECTION_RULES) == {"all", "cross", "self", "matchmask"}
