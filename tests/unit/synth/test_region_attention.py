import copy

import numpy as np
import pytest
import torch

from loraseg.synth.region_attention import RegionControl
from loraseg.synth.regions import Regions
from tests.unit.synth.reference_attention import ReferenceProcessor
from tests.unit.synth.region_inputs import (
    LONG_NAMES,
    NAMES,
    PIPELINES,
    cross_modules,
    random_alphas,
    random_conditions,
    run_unet,
    unet_inputs,
)


@torch.no_grad()
def reference_output(unet, conditions, arguments, alphas, mode, *, unconditional):
    """Run the UNet in float64 with the reference processor in every cross-attention module."""
    unet = copy.deepcopy(unet).double()
    for name, module in cross_modules(unet).items():
        weight = alphas.get(f"{name}.alpha.weight")
        bias = alphas.get(f"{name}.alpha.bias")

        def share(hidden, weight=weight, bias=bias):
            if weight is None:
                return np.zeros(len(hidden))
            inputs = np.tile(hidden.mean(0), (len(hidden), 1)) if mode == "pooled" else hidden
            logits = inputs @ weight[0].double().numpy() + bias.double().numpy()
            return 1 / (1 + np.exp(-logits))

        module.set_processor(
            ReferenceProcessor(
                [condition.regions for condition in conditions],
                [condition.token_classes for condition in conditions],
                unconditional=unconditional,
                latent=tuple(arguments["sample"].shape[2:]),
                share=share,
            )
        )
    doubled = {
        key: value.double() if key in ("sample", "encoder_hidden_states") else value
        for key, value in arguments.items()
    }
    if "added_cond_kwargs" in arguments:
        added = arguments["added_cond_kwargs"]
        doubled["added_cond_kwargs"] = {key: value.double() for key, value in added.items()}
    return unet(**doubled).sample


@pytest.mark.parametrize(
    ("kind", "latent", "names", "mode", "learned"),
    [
        ("sd", (8, 8), NAMES, "token", 2),
        ("sd", (8, 12), NAMES, "pooled", 99),
        ("v", (9, 7), LONG_NAMES, "token", 99),
        ("sdxl", (6, 8), NAMES, "token", 2),
    ],
)
def test_equals_loops_over_heads_positions_and_tokens(kind, latent, names, mode, learned):
    pipeline = PIPELINES[kind]
    conditions = random_conditions(pipeline, names, count=1, side=24)
    assert all(condition.dropped for condition in conditions) == (names is LONG_NAMES)
    arguments = unet_inputs(pipeline.unet, 2, latent)
    modules = list(cross_modules(pipeline.unet))[:learned]
    control = RegionControl(pipeline.unet, alpha_modules=modules, mode=mode)
    alphas = random_alphas(control)
    control.load_alphas(alphas)
    regions = Regions.stack(conditions)
    got = run_unet(control, regions, arguments, pipeline.unet, unconditional=1)
    expected = reference_output(pipeline.unet, conditions, arguments, alphas, mode, unconditional=1)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    # The mask matters: without regions the output differs.
    assert (run_unet(control, None, arguments, pipeline.unet)[1] - got[1]).abs().max() > 1e-3


# diffusers' Euler scheduler calls numpy in a way that numpy 2 warns about.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize(
    ("learned", "bias", "fixed", "masked"),
    [(0, 0.0, 0.0, False), (99, 0.0, 0.0, False), (99, 50.0, 0.0, True), (0, 0.0, 1.0, True)],
)
def test_stock_pipelines_give_the_same_bits(kind, learned, bias, fixed, masked):
    """Without regions, and with every share equal to one."""
    pipeline = PIPELINES[kind]
    modules = list(cross_modules(pipeline.unet))[:learned]
    control = RegionControl(
        pipeline.unet, alpha_modules=modules, initial_bias=bias, fixed_share=fixed
    )
    regions = Regions.stack(random_conditions(pipeline)) if masked else None
    stock = sampled(pipeline)
    with control.installed(), control.regions(regions, unconditional=2, latent=(16, 16)):
        ours = sampled(pipeline)
    np.testing.assert_array_equal(ours, stock)
    np.testing.assert_array_equal(sampled(pipeline), stock)


def sampled(pipeline):
    """Two images of two prompts by the stock call."""
    return pipeline(
        ["road sky", "sidewalk"],
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="np",
    ).images


def test_regions_change_what_the_stock_pipeline_gives():
    pipeline = PIPELINES["sd"]
    control = RegionControl(pipeline.unet)
    regions = Regions.stack(random_conditions(pipeline))
    with control.installed(), control.regions(regions, unconditional=2, latent=(16, 16)):
        ours = sampled(pipeline)
    assert np.abs(ours - sampled(pipeline)).max() > 1e-3


@pytest.mark.parametrize("learned", [0, 99])
def test_rows_without_a_condition_keep_their_bits(learned):
    unet = PIPELINES["sd"].unet
    arguments = unet_inputs(unet, 4)
    control = RegionControl(unet, alpha_modules=list(cross_modules(unet))[:learned])
    regions = Regions.stack(random_conditions(PIPELINES["sd"]))
    ours = run_unet(control, regions, arguments, unet, unconditional=2)
    with torch.no_grad():
        stock = unet(**arguments).sample
    assert torch.equal(ours[:2], stock[:2])
    assert ((ours[2:] - stock[2:]).abs().amax((1, 2, 3)) > 1e-3).all()


def test_a_share_of_zero_is_rectified_attention():
    unet = PIPELINES["sd"].unet
    arguments = unet_inputs(unet, 4)
    regions = Regions.stack(random_conditions(PIPELINES["sd"]))
    modules = list(cross_modules(unet))
    closed = RegionControl(unet, alpha_modules=modules, initial_bias=-200.0)
    for free, rows in (
        (2, regions),
        (0, Regions.stack(random_conditions(PIPELINES["sd"], count=4))),
    ):
        ours = run_unet(closed, rows, arguments, unet, unconditional=free)
        assert torch.equal(
            ours, run_unet(RegionControl(unet), rows, arguments, unet, unconditional=free)
        )


def test_a_fixed_share_equals_a_learned_share_of_that_value():
    unet = PIPELINES["sd"].unet
    arguments = unet_inputs(unet, 2)
    regions = Regions.stack(random_conditions(PIPELINES["sd"]))
    learned = RegionControl(unet, alpha_modules=list(cross_modules(unet)), initial_bias=0.0)
    fixed = RegionControl(unet, fixed_share=0.5)
    ours, expected = (run_unet(control, regions, arguments, unet) for control in (learned, fixed))
    assert torch.equal(ours, expected)


def test_cross_attention_is_detected_by_its_inputs():
    """In a block without self-attention, attn1 attends to text too."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        **{**PIPELINES["sd"].unet.config, "only_cross_attention": (True, False)}
    ).eval()
    assert any(".attn1" in name for name in cross_modules(unet))
    conditions = random_conditions(PIPELINES["sd"], count=1)
    arguments = unet_inputs(unet, 1, (8, 8))
    got = run_unet(RegionControl(unet), Regions.stack(conditions), arguments, unet)
    expected = reference_output(unet, conditions, arguments, {}, "token", unconditional=0)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
