"""The loop against the stock diffusers pipelines, and what it computes how often."""

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
    own, noises = tiny_base(kind), streams()
    noise = torch.stack([one.initial((4, *latent)) for one in noises])
    # As the stock pipeline encodes them: all prompts at once.
    text = own.encode_text(PROMPTS)
    batch = SamplingBatch(
        noise=noise,
        text=text if not shared else text.select([0, 1]),
        prompts=(0, 1, 1) if shared else (0, 1, 2),
        unconditional=own.encode_unconditional() if config.guidance > 1 else None,
        generators=[one.generator for one in noises],
        shared_text=shared,
    )
    return denoise(own, RegionControl(own.unet), batch, config)


def stock(kind, config, *, latent=(16, 24)):
    own, noises = tiny_pipeline(kind), streams()
    noise = torch.stack([one.initial((4, *latent)) for one in noises])
    before = own.scheduler
    own.scheduler = SchedulerSteps(
        before, config.scheduler, config.steps, torch.device("cpu")
    )._scheduler
    try:
        return own(
            PROMPTS,
            height=2 * latent[0],
            width=2 * latent[1],
            latents=noise,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=[one.generator for one in noises],
            output_type="latent",
        ).images
    finally:
        own.scheduler = before


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "euler-a"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_without_regions_the_stock_pipeline_bit_for_bit(kind, scheduler, guidance):
    config = SamplingConfig(steps=5, guidance=guidance, scheduler=scheduler)
    expected = stock(kind, config)
    assert torch.equal(ours(kind, config), expected)
    assert torch.equal(ours(kind, config, shared=False), expected)


def test_the_stock_default_of_50_steps(monkeypatch):
    config = SamplingConfig()
    assert (config.steps, config.guidance, config.scheduler) == (50, 2.0, "pndm")
    calls = []
    unet = tiny_base("sd").unet
    forward = unet.forward
    monkeypatch.setattr(
        unet, "forward", lambda *a, **k: (calls.append(len(a[0])), forward(*a, **k))[1]
    )
    got = ours("sd", config, latent=(8, 8))
    assert calls == [6] * 51  # two halves of three images, once a timestep
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


def test_keys_and_values_once_a_prompt_and_module():
    own = tiny_base("sd")
    control = RegionControl(own.unet)
    cross = sum(1 for module in own.unet.modules() if getattr(module, "is_cross_attention", False))
    noises = streams()
    batch = SamplingBatch(
        noise=torch.stack([one.initial((4, 16, 16)) for one in noises]),
        text=own.encode_text(["road", "car"]),
        prompts=(0, 1, 1),
        unconditional=own.encode_unconditional(),
        generators=[one.generator for one in noises],
    )
    denoise(own, control, batch, SamplingConfig(steps=6))
    assert control.projections_computed == cross * 3  # two prompts and the empty one


def test_prompts_are_encoded_once_and_alone(monkeypatch):
    own = tiny_base("sd")
    cache = PromptCache(own, limit=2)
    before = own.encoded_prompts
    first = cache.encode(["road", "sky", "road"])
    assert own.encoded_prompts - before == 2
    again = cache.encode(["road"])
    assert own.encoded_prompts - before == 2
    assert torch.equal(first.hidden[0], again.hidden[0])
    assert torch.equal(first.hidden[2], own.encode_text(["road"]).hidden[0])
    cache.encode(["car"])  # over the limit: the oldest, sky, is forgotten
    count = own.encoded_prompts
    cache.encode(["road", "car"])
    assert own.encoded_prompts == count
    assert torch.equal(cache.unconditional.hidden, own.encode_text([""]).hidden)
    count = own.encoded_prompts
    assert cache.unconditional is cache.unconditional
    assert own.encoded_prompts == count


def test_noise_is_a_stream_of_the_image():
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
def test_settings_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**values)


def test_the_unet_only_reads_masks_and_text(monkeypatch):
    """A compiled UNet is compiled anew for whatever its own calls change."""
    own, noises = tiny_base("sd"), streams(2)
    control = RegionControl(own.unet)
    conditions = [make_generator().conditioner(block_mask(number)) for number in range(2)]
    batch = SamplingBatch(
        noise=torch.stack([one.initial((4, 16, 16)) for one in noises]),
        text=own.encode_text([one.prompt for one in conditions]),
        prompts=(0, 1),
        unconditional=own.encode_unconditional(),
        generators=[one.generator for one in noises],
        regions=Regions.stack(conditions),
    )
    states = []
    forward = own.unet.forward

    def state():
        return control.projections_computed, sorted(batch.regions._biases, key=str)

    def watched(*arguments, **named):
        states.append(state())
        result = forward(*arguments, **named)
        states.append(state())
        return result

    monkeypatch.setattr(own.unet, "forward", watched)
    denoise(own, control, batch, SamplingConfig(steps=2))
    assert len(states) == 6
    assert all(one == states[0] for one in states)
    assert [key[:2] for key in states[0][1]] == [(16, 16), (8, 8)]
