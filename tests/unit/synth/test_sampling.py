"""Sampling against the stock diffusers pipelines, and the number of its computations."""

import pytest
import torch

from loraseg.errors import ConfigError
from loraseg.seeding import derive
from loraseg.synth.region_attention import RegionControl
from loraseg.synth.regions import Regions
from loraseg.synth.sampling import (
    NoiseStream,
    PromptCache,
    SamplingBatch,
    SamplingConfig,
    denoise,
)
from loraseg.synth.schedulers import SchedulerSteps
from tests.unit.synth.tiny_generator import (
    PIPELINES,
    block_mask,
    make_generator,
    one_thread,  # noqa: F401
    tiny_base,
    tiny_pipeline,
)

PROMPTS = ["road sky", "car in heavy fog", "car in heavy fog"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]


def streams(count=3):
    return [NoiseStream(5, "mask", k) for k in range(count)]


def ours(kind, config, *, shared=True, latent=(16, 24)):
    base, noises = tiny_base(kind), streams()
    noise = torch.stack([stream.initial((4, *latent)) for stream in noises])
    # As in the stock pipeline, all prompts are encoded in one batch.
    text = base.encode_text(PROMPTS)
    batch = SamplingBatch(
        noise=noise,
        text=text if not shared else text.select([0, 1]),
        prompts=(0, 1, 1) if shared else (0, 1, 2),
        unconditional=base.encode_unconditional() if config.guidance > 1 else None,
        generators=[stream.generator for stream in noises],
        shared_text=shared,
    )
    return denoise(base, RegionControl(base.unet), batch, config)


def stock(kind, config, *, latent=(16, 24)):
    pipeline, noises = tiny_pipeline(kind), streams()
    noise = torch.stack([stream.initial((4, *latent)) for stream in noises])
    before = pipeline.scheduler
    pipeline.scheduler = SchedulerSteps(
        before, config.scheduler, config.steps, torch.device("cpu")
    )._scheduler
    try:
        return pipeline(
            PROMPTS,
            height=2 * latent[0],
            width=2 * latent[1],
            latents=noise,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=[stream.generator for stream in noises],
            output_type="latent",
        ).images
    finally:
        pipeline.scheduler = before


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "euler-a"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_without_regions_it_equals_the_stock_pipeline_bit_for_bit(kind, scheduler, guidance):
    config = SamplingConfig(steps=5, guidance=guidance, scheduler=scheduler)
    expected = stock(kind, config)
    assert torch.equal(ours(kind, config), expected)
    assert torch.equal(ours(kind, config, shared=False), expected)


def test_the_defaults_are_50_steps_of_plms(monkeypatch):
    config = SamplingConfig()
    assert (config.steps, config.guidance, config.scheduler) == (50, 2.0, "pndm")
    calls = []
    unet = tiny_base("sd").unet
    forward = unet.forward
    monkeypatch.setattr(
        unet, "forward", lambda *a, **k: (calls.append(len(a[0])), forward(*a, **k))[1]
    )
    got = ours("sd", config, latent=(8, 8))
    assert calls == [6] * 51  # two halves of three images per timestep
    monkeypatch.undo()
    assert torch.equal(got, stock("sd", config, latent=(8, 8)))


def test_guidance_one_has_no_unconditional_half(monkeypatch):
    calls = []
    unet = tiny_base("sd").unet
    forward = unet.forward
    monkeypatch.setattr(
        unet, "forward", lambda *a, **k: (calls.append(len(a[0])), forward(*a, **k))[1]
    )
    ours("sd", SamplingConfig(steps=3, guidance=1.0, scheduler="ddim"))
    assert calls == [3] * 3


def test_keys_and_values_are_computed_once_per_prompt_and_module():
    base = tiny_base("sd")
    control = RegionControl(base.unet)
    cross = sum(1 for module in base.unet.modules() if getattr(module, "is_cross_attention", False))
    noises = streams()
    batch = SamplingBatch(
        noise=torch.stack([stream.initial((4, 16, 16)) for stream in noises]),
        text=base.encode_text(["road", "car"]),
        prompts=(0, 1, 1),
        unconditional=base.encode_unconditional(),
        generators=[stream.generator for stream in noises],
    )
    denoise(base, control, batch, SamplingConfig(steps=6))
    assert control.projections_computed == cross * 3  # two prompts and the unconditional one


def test_each_prompt_is_encoded_once_in_a_batch_of_its_own(monkeypatch):
    base = tiny_base("sd")
    cache = PromptCache(base, limit=2)
    before = base.encoded_prompts
    first = cache.encode(["road", "sky", "road"])
    assert base.encoded_prompts - before == 2
    again = cache.encode(["road"])
    assert base.encoded_prompts - before == 2
    assert torch.equal(first.hidden[0], again.hidden[0])
    assert torch.equal(first.hidden[2], base.encode_text(["road"]).hidden[0])
    cache.encode(["car"])  # over the limit: sky, used least recently, is evicted
    count = base.encoded_prompts
    cache.encode(["road", "car"])
    assert base.encoded_prompts == count
    assert torch.equal(cache.unconditional.hidden, base.encode_text([""]).hidden)
    count = base.encoded_prompts
    assert cache.unconditional is cache.unconditional
    assert base.encoded_prompts == count


def test_noise_depends_on_seed_mask_and_k_only():
    one, two = NoiseStream(5, "mask", 1), NoiseStream(5, "mask", 1)
    assert one.seed == derive(5, "synth", "mask", 1)
    assert torch.equal(one.initial((4, 8, 8)), two.initial((4, 8, 8)))
    for other in (NoiseStream(6, "mask", 1), NoiseStream(5, "m", 1), NoiseStream(5, "mask", 2)):
        assert not torch.equal(
            other.initial((4, 8, 8)), NoiseStream(5, "mask", 1).initial((4, 8, 8))
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": 0}, "images: got 0"),
        ({"steps": 0}, "steps: got 0"),
        ({"batch": -1}, "batch: got -1"),
        ({"decode_slice": 0}, "decode_slice: got 0"),
        ({"guidance": 0.5}, "guidance: got 0.5, expected a finite number from 1"),
        ({"guidance": float("nan")}, "guidance: got nan"),
        ({"guidance": float("inf")}, "guidance: got inf"),
        ({"size": (0, 8)}, "size: got"),
        ({"scheduler": "dim"}, "did you mean 'ddim'"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**values)


def test_the_unet_does_not_change_masks_and_text(monkeypatch):
    """torch.compile recompiles a UNet whose calls change captured state."""
    base, noises = tiny_base("sd"), streams(2)
    control = RegionControl(base.unet)
    conditions = [make_generator().conditioner(block_mask(number)) for number in range(2)]
    batch = SamplingBatch(
        noise=torch.stack([stream.initial((4, 16, 16)) for stream in noises]),
        text=base.encode_text([condition.prompt for condition in conditions]),
        prompts=(0, 1),
        unconditional=base.encode_unconditional(),
        generators=[stream.generator for stream in noises],
        regions=Regions.stack(conditions),
    )
    states = []
    forward = base.unet.forward

    def state():
        return control.projections_computed, sorted(batch.regions._biases, key=str)

    def recording_forward(*arguments, **kwargs):
        states.append(state())
        result = forward(*arguments, **kwargs)
        states.append(state())
        return result

    monkeypatch.setattr(base.unet, "forward", recording_forward)
    denoise(base, control, batch, SamplingConfig(steps=2))
    assert len(states) == 6
    assert all(recorded == states[0] for recorded in states)
    assert [key[:2] for key in states[0][1]] == [(16, 16), (8, 8)]
