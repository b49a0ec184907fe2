import copy
import math

import peft
import pytest
import torch

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.fuse import AdapterBank, fuse
from loraseg.synth.region_attention import RegionControl, alpha_module_names
from loraseg.synth.regions import Regions
from tests.unit.synth.region_inputs import (
    PIPELINES,
    cross_modules,
    random_alphas,
    random_conditions,
    run_unet,
    unet_inputs,
)
from tests.unit.tiny_diffusion import full_unet, tiny_sd

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn2"
INDEX = torch.tensor([0, 0, 0, 0, 1, 1, 2, 1])


def texts(unet, count=3):
    generator = torch.Generator().manual_seed(5)
    return torch.randn((count, 77, unet.config.cross_attention_dim), generator=generator)


def with_lora(unet, names):
    """Inject stock peft layers with random weights."""
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.inject_adapter_in_model(config, unet)


def cached(control, regions, arguments, unet, hidden, index, *, steps=1):
    """Call the UNet ``steps`` times with cached text, passing a wrong text that is not read."""
    rows = len(arguments["sample"])
    arguments = {**arguments, "encoder_hidden_states": hidden[:1].expand(rows, -1, -1)}
    latent = tuple(arguments["sample"].shape[2:])
    masks = control.regions(regions, unconditional=4, latent=latent)
    with torch.no_grad(), control.installed(), control.cached_text(hidden, index), masks:
        return [unet(**arguments).sample for _ in range(steps)][-1]


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("masked", [False, True])
def test_cached_text_equals_projecting_at_every_call(kind, masked):
    unet = PIPELINES[kind].unet
    hidden, arguments = texts(unet), unet_inputs(unet, 8)
    arguments["encoder_hidden_states"] = hidden[INDEX]
    control = RegionControl(unet, alpha_modules=[MODULE])
    regions = Regions.stack(random_conditions(PIPELINES[kind], count=4)) if masked else None
    plain = run_unet(control, regions, arguments, unet, unconditional=4)
    modules = len(cross_modules(unet))
    assert control.projections_computed == 8 * modules
    ours = cached(control, regions, arguments, unet, hidden, INDEX, steps=3)
    # Once per prompt and module, for any number of calls and rows.
    assert control.projections_computed == 8 * modules + 3 * modules
    assert _psnr(ours, plain) > 100
    # Another run computes new projections.
    other = cached(control, regions, arguments, unet, 2 * hidden, INDEX)
    assert control.projections_computed == 8 * modules + 6 * modules
    assert not torch.equal(ours, other)


def test_cached_text_with_adapters_on_keys_and_values():
    pipeline = tiny_sd()
    unet = with_lora(pipeline.unet, ["attn2.to_k", "attn2.to_v", "attn2.to_q", "attn2.to_out.0"])
    hidden, arguments = texts(unet), unet_inputs(unet, 8)
    arguments["encoder_hidden_states"] = hidden[INDEX]
    control = RegionControl(unet)
    regions = Regions.stack(random_conditions(pipeline, count=4))
    plain = run_unet(control, regions, arguments, unet, unconditional=4)
    assert _psnr(cached(control, regions, arguments, unet, hidden, INDEX, steps=2), plain) > 100
    bare = run_unet(
        RegionControl(tiny_sd().unet), regions, arguments, tiny_sd().unet, unconditional=4
    )
    assert (plain - bare).abs().max() > 1e-3


def test_one_prompt_per_row_keeps_the_bits():
    unet = PIPELINES["sd"].unet
    hidden, arguments = texts(unet)[INDEX], unet_inputs(unet, 8)
    arguments["encoder_hidden_states"] = hidden
    control, regions = (
        RegionControl(unet),
        Regions.stack(random_conditions(PIPELINES["sd"], count=4)),
    )
    plain = run_unet(control, regions, arguments, unet, unconditional=4)
    ours = cached(control, regions, arguments, unet, hidden, torch.arange(8), steps=2)
    assert torch.equal(ours, plain)


def test_cached_text_with_different_adapters_in_every_row():
    unet = copy.deepcopy(PIPELINES["sd"].unet)
    hidden, arguments = texts(unet)[INDEX], unet_inputs(unet, 8)
    arguments["encoder_hidden_states"] = hidden
    control, regions = (
        RegionControl(unet),
        Regions.stack(random_conditions(PIPELINES["sd"], count=4)),
    )
    mixes = [fuse([adapter(unet, seed)], [1.0]) if seed else None for seed in (0, 1, 2, 3)] * 2
    bare = run_unet(control, regions, arguments, unet, unconditional=4)
    with AdapterBank(unet).use(mixes):
        plain = run_unet(control, regions, arguments, unet, unconditional=4)
        ours = cached(control, regions, arguments, unet, hidden, torch.arange(8), steps=2)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)
    changed = (plain - bare).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, True, True, True] * 2


def adapter(unet, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, attn in cross_modules(unet).items():
        d_out, d_in = attn.to_k.weight.shape
        down, up = (torch.randn(shape, generator=generator) for shape in ((2, d_in), (d_out, 2)))
        pairs[f"{name}.to_k"] = LoraPair(down, up, 0.5)
    return Adapter(name=f"head{seed}", pairs=pairs, digest=f"{seed:064x}")


def _psnr(ours, plain):
    error = float((ours.double() - plain.double()).square().mean())
    return 10 * math.log10(float(plain.abs().max()) ** 2 / max(error, 1e-30))


@pytest.mark.parametrize("mode", ["token", "pooled"])
def test_gradients_reach_shares_and_adapters(mode):
    """Against central differences of the loss in float64."""
    pipeline = tiny_sd()
    unet = with_lora(pipeline.unet.requires_grad_(False), ["attn2.to_k", "attn2.to_q"]).double()
    control = RegionControl(unet, alpha_modules=[MODULE], mode=mode)
    control.load_alphas(random_alphas(control))
    arguments = unet_inputs(unet, 2, (8, 8), torch.float64)
    regions = Regions.stack(random_conditions(pipeline))
    lora = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    parameters = {**control.alphas(), **lora}

    def loss():
        with control.installed(), control.regions(regions, latent=(8, 8)):
            return unet(**arguments).sample.square().sum()

    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    generator = torch.Generator().manual_seed(0)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        step, values = 1e-3 if ".alpha." in name else 1e-5, []
        before = parameter.detach().clone()
        for sign in (1, -1):
            parameter.data = before + sign * step * direction
            with torch.no_grad():
                values.append(loss())
        parameter.data = before
        expected = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(
            (gradient * direction).sum().double(), expected, rtol=2e-3, atol=1e-6, msg=name
        )


def test_gradient_checkpointing_keeps_the_gradients():
    pipeline = tiny_sd()
    unet = pipeline.unet.requires_grad_(False).train()
    control = RegionControl(unet, alpha_modules=[MODULE])
    regions, arguments = Regions.stack(random_conditions(pipeline)), unet_inputs(unet, 2)
    arguments["sample"].requires_grad_()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        with control.installed(), control.regions(regions, latent=(16, 16)):
            loss = unet(**arguments).sample.square().sum()
            gradients.append(torch.autograd.grad(loss, list(control.alphas().values())))
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("automatic", [False, True])
def test_half_precision(automatic):
    """A base in bfloat16, or with autocast to it, with shares in float32."""
    unet = copy.deepcopy(PIPELINES["sd"].unet)
    regions, arguments = Regions.stack(random_conditions(PIPELINES["sd"])), unet_inputs(unet, 4)
    modules = list(cross_modules(unet))
    alphas = random_alphas(RegionControl(unet, alpha_modules=modules))

    def ours(**settings):
        control = RegionControl(unet, alpha_modules=modules, **settings)
        if not settings:
            control.load_alphas(alphas)
        return run_unet(control, regions, arguments, unet, unconditional=2)

    expected = ours()
    if not automatic:
        unet.bfloat16()
        for key in ("sample", "encoder_hidden_states"):
            arguments[key] = arguments[key].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=automatic), torch.no_grad():
        torch.testing.assert_close(ours().float(), expected, rtol=0, atol=0.05)
        assert torch.equal(ours(initial_bias=50.0), unet(**arguments).sample)


def test_the_base_is_not_changed():
    unet = PIPELINES["sd"].unet
    keys, processors = list(unet.state_dict()), dict(unet.attn_processors)
    control = RegionControl(unet, alpha_modules=list(cross_modules(unet)))

    def stop_inside():
        with control.installed():
            assert list(unet.state_dict()) == keys
            assert unet.attn_processors != processors
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_inside()
    assert unet.attn_processors == processors


def test_a_new_control_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    RegionControl(PIPELINES["sd"].unet, alpha_modules=[MODULE])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_regions_are_reset_at_the_end_of_their_block():
    unet = PIPELINES["sd"].unet
    arguments = unet_inputs(unet, 2)
    control, regions = RegionControl(unet), Regions.stack(random_conditions(PIPELINES["sd"]))
    with torch.no_grad(), control.installed():
        with control.regions(regions, latent=(16, 16)):
            outer = unet(**arguments).sample
            with control.regions(None, latent=(16, 16)):
                inner = unet(**arguments).sample
            assert torch.equal(unet(**arguments).sample, outer)
        assert torch.equal(unet(**arguments).sample, inner)
    assert not torch.equal(inner, outer)


def test_the_alphas_of_sd14_have_4810_parameters():
    unet = full_unet("sd1.4")
    modules = [
        name
        for name in cross_modules(unet)
        if name.startswith(("down_blocks.0", "down_blocks.1", "up_blocks.2", "up_blocks.3"))
    ]
    alphas = RegionControl(unet, alpha_modules=modules).alphas()
    assert sum(parameter.numel() for parameter in alphas.values()) == 4810


def test_alphas_start_near_rectified_attention():
    state = RegionControl(PIPELINES["sd"].unet, alpha_modules=[MODULE]).alpha_state()
    assert set(state) == {f"{MODULE}.alpha.weight", f"{MODULE}.alpha.bias"}
    assert state[f"{MODULE}.alpha.weight"].shape == (1, 16)
    assert not state[f"{MODULE}.alpha.weight"].any()
    assert state[f"{MODULE}.alpha.bias"].tolist() == [-2.0]


def test_alphas_can_be_saved_and_loaded():
    unet = PIPELINES["sd"].unet
    source = RegionControl(unet, alpha_modules=list(cross_modules(unet)))
    source.load_alphas(random_alphas(source))
    state = source.alpha_state()
    other = RegionControl(unet, alpha_modules=alpha_module_names(state))
    other.load_alphas(state)
    assert all(torch.equal(value, state[key]) for key, value in other.alpha_state().items())
    state[f"{MODULE}.alpha.bias"].zero_()
    assert source.alpha_state()[f"{MODULE}.alpha.bias"].any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"other.alpha.bias": torch.zeros(1)},
            "got 3 tensors, expected 2; unmatched keys: other.alpha.bias",
        ),
        ({f"{MODULE}.alpha.weight": torch.zeros(1, 3)}, r"got \(1, 3\), .* shape \(1, 16\)"),
        ({f"{MODULE}.alpha.bias": torch.tensor([float("nan")])}, "expected finite values"),
    ],
)
def test_alphas_that_do_not_fit_are_refused(change, match):
    control = RegionControl(PIPELINES["sd"].unet, alpha_modules=[MODULE])
    state = {key: value + 1 for key, value in control.alpha_state().items()}
    with pytest.raises(AdapterMismatchError, match=match):
        control.load_alphas({**state, **change})
    assert control.alpha_state()[f"{MODULE}.alpha.bias"].tolist() == [-2.0]


def test_keys_that_are_not_alphas_are_refused():
    with pytest.raises(AdapterMismatchError, match=r"got key 'x\.lora_A\.weight'"):
        alpha_module_names({"x.lora_A.weight": torch.zeros(1)})


def test_invalid_settings_are_refused():
    unet = PIPELINES["sd"].unet
    with pytest.raises(ConfigError, match=r"no cross-attention module .* did you mean"):
        RegionControl(unet, alpha_modules=[MODULE.replace("attn2", "attn1")])
    with pytest.raises(ConfigError, match=r"fixed_share 1.5: expected a value in \[0, 1\]"):
        RegionControl(unet, fixed_share=1.5)
    sliced = tiny_sd().unet
    sliced.set_attention_slice(1)
    with pytest.raises(ConfigError, match="its processor is SlicedAttnProcessor"):
        RegionControl(sliced)


def test_other_processors_are_detected():
    unet = tiny_sd().unet
    control, other, latent = RegionControl(unet), RegionControl(unet), (16, 16)
    with pytest.raises(StageError, match="enter installed"), control.regions(None, latent=latent):
        pass
    with control.installed():
        with (
            pytest.raises(StageError, match="processor is RegionAttentionProcessor"),
            other.installed(),
        ):
            pass
        unet.set_attention_slice(1)
        with pytest.raises(StageError, match="SlicedAttn"), control.regions(None, latent=latent):
            pass


def test_batches_that_do_not_fit_are_refused():
    unet = PIPELINES["sd"].unet
    control, regions = RegionControl(unet), Regions.stack(random_conditions(PIPELINES["sd"]))
    with pytest.raises(StageError, match="got 3 rows, expected 4, 2 of them unconditional"):
        run_unet(control, regions, unet_inputs(unet, 3), unet, unconditional=2)
    hidden = texts(unet)
    with pytest.raises(StageError, match="got 8 rows, expected 3, one per index"):
        cached(control, regions, unet_inputs(unet, 8), unet, hidden, torch.arange(3))
    with pytest.raises(ConfigError, match=r"of 3 prompts: got indices \[0, 3\]"):
        cached(control, regions, unet_inputs(unet, 2), unet, hidden, torch.tensor([0, 3]))
    arguments = {**unet_inputs(unet, 2), "encoder_attention_mask": torch.ones(2, 77)}
    with pytest.raises(StageError, match="an attention mask in addition"):
        run_unet(control, regions, arguments, unet)


def test_cached_text_is_refused_in_training():
    unet = PIPELINES["sd"].unet
    control = RegionControl(unet)
    arguments = unet_inputs(unet, 3)
    cached_text = control.cached_text(texts(unet), torch.arange(3))
    with control.installed(), pytest.raises(StageError, match="gradients are enabled"), cached_text:
        unet(**arguments)
