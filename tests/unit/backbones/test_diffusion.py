"""The text-to-image model against the stock pipelines and schedulers."""

import logging
import types

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from loraseg.backbones.diffusion import DiffusionBase, TextEncoding, get_alphas_cumprod
from loraseg.errors import ConfigError, DatasetError, IntegrityError
from loraseg.seeding import torch_generator
from tests.unit.tiny_diffusion import SCHEDULE, tiny_sd, tiny_sdxl

PIPELINES = {"sd": tiny_sd, "sdxl": tiny_sdxl}
PROMPTS = ["road car", "sidewalk and a traffic light in heavy fog", "", "building " * 100]


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return PIPELINES[request.param]()


@pytest.fixture(scope="module")
def base(pipeline):
    return DiffusionBase.from_pipeline(pipeline, name="tiny", digest="ab" * 32)


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 24, 40, 3), generator=torch_generator(0), dtype=torch.uint8)


def test_properties(base, pipeline):
    assert (base.kind == "sdxl") == hasattr(pipeline, "tokenizer_2")
    assert len(base.tokenizers) == len(base.text_encoders) == (2 if base.kind == "sdxl" else 1)
    assert (base.latent_channels, base.latent_factor, base.image_size) == (4, 2, 32)
    assert (base.text_length, base.prediction_type) == (77, "epsilon")
    assert (base.device, base.dtype) == (torch.device("cpu"), torch.float32)
    assert base.latent_factor == pipeline.vae_scale_factor
    assert base.unet is pipeline.unet
    assert not any(part.training for part in (base.unet, base.vae, *base.text_encoders))


def test_text_encodings_equal_those_of_the_stock_pipeline(base, pipeline):
    outputs = pipeline.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    text = base.encode_text(PROMPTS)
    assert torch.equal(text.hidden, outputs[0])
    empty = base.encode_unconditional()
    assert torch.equal(empty.hidden, outputs[1][:1])
    assert base.zero_unconditional == (base.kind == "sdxl")
    if base.kind == "sd":
        assert text.pooled is empty.pooled is None
    else:
        assert torch.equal(text.pooled, outputs[2])
        assert torch.equal(empty.pooled, outputs[3][:1])


def test_sdxl_can_encode_the_empty_prompt():
    pipeline = tiny_sdxl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    base = DiffusionBase.from_pipeline(pipeline, name="tiny", digest="ab" * 32)
    _, empty, _, pooled = pipeline.encode_prompt("car", device="cpu")
    assert torch.equal(base.encode_unconditional().hidden, empty)
    assert torch.equal(base.encode_unconditional().pooled, pooled)
    assert empty.abs().max() > 0


def test_select_rows_of_an_encoding(base):
    text = base.encode_text(PROMPTS)
    chosen = text.select([1, 0, 1])
    assert torch.equal(chosen.hidden, text.hidden[[1, 0, 1]])
    assert (chosen.pooled is None) == (text.pooled is None)
    if text.pooled is not None:
        assert torch.equal(chosen.pooled, text.pooled[[1, 0, 1]])


def test_encoded_prompts_are_counted():
    base = DiffusionBase.from_pipeline(tiny_sd(), name="tiny", digest="ab" * 32)
    assert base.encoded_prompts == 0
    base.encode_text(["road", "car"])
    base.encode_unconditional()
    assert base.encoded_prompts == 3
    with pytest.raises(DatasetError, match="got no prompts"):
        base.encode_text([])
    assert base.encoded_prompts == 3


def test_latents_equal_those_of_the_stock_vae(base, pipeline, images):
    pictures = [Image.fromarray(image.numpy()) for image in images]
    pixels = VaeImageProcessor(vae_scale_factor=2).preprocess(pictures)
    scale = pipeline.vae.config.scaling_factor
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        drawn = posterior.sample(torch_generator(1)) * scale
    assert torch.equal(base.encode_images(images), posterior.mode() * scale)
    assert torch.equal(base.encode_images(images, torch_generator(1)), drawn)
    assert base.encode_images(images).shape == (3, 4, 12, 20)


def test_decoded_images_equal_those_of_the_stock_pipeline(base, pipeline):
    latents = torch.randn(3, 4, 12, 20, generator=torch_generator(2))
    with torch.no_grad():
        pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pictures = pipeline.image_processor.postprocess(pixels, output_type="pil")
    expected = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    images = base.decode_latents(latents, slice_size=3)
    assert images.shape == (3, 24, 40, 3)
    assert torch.equal(images, expected)
    sliced = base.decode_latents(latents, slice_size=2)
    # The order of summation in convolutions can depend on the batch size.
    assert (sliced.int() - expected.int()).abs().max() <= 1
    assert base.decode_latents(latents[:0]).shape == (0, 24, 40, 3)
    with pytest.raises(ConfigError, match="slice_size 0, expected at least 1"):
        base.decode_latents(latents, slice_size=0)


@pytest.mark.parametrize("size", [(23, 40), (24, 1), (0, 8)])
def test_images_of_unsupported_sizes_are_refused(base, size):
    with pytest.raises(DatasetError, match=f"images of {size[0]} x {size[1]}, expected sides"):
        base.encode_images(torch.zeros(1, *size, 3, dtype=torch.uint8))


def test_latents_of_a_vae_with_statistics():
    pipeline = tiny_sdxl()
    mean, deviation = [0.1, -0.2, 0.3, 0.4], [1.5, 0.5, 2.0, 1.0]
    plain = DiffusionBase.from_pipeline(pipeline, name="tiny", digest="ab" * 32)
    images = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8, generator=torch_generator(0))
    raw = plain.encode_images(images) / pipeline.vae.config.scaling_factor
    before = plain.decode_latents(plain.encode_images(images))
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    latents = plain.encode_images(images)
    # As in the stock SDXL pipeline before decoding.
    shift, spread = (torch.tensor(value).view(1, 4, 1, 1) for value in (mean, deviation))
    back = latents * spread / pipeline.vae.config.scaling_factor + shift
    torch.testing.assert_close(back, raw, rtol=1e-5, atol=1e-6)
    assert (plain.decode_latents(latents).int() - before.int()).abs().max() <= 1


def test_size_conditions_equal_those_of_the_stock_pipeline():
    pipeline = tiny_sdxl()
    base = DiffusionBase.from_pipeline(pipeline, name="tiny", digest="ab" * 32)
    text = base.encode_text(["road", "car"])
    ids = pipeline._get_add_time_ids((32, 48), (4, 8), (16, 24), torch.float32, 12)
    added = base.added_conditions(text, (32, 48), (4, 8), (16, 24))
    assert set(added) == {"text_embeds", "time_ids"}
    assert torch.equal(added["time_ids"], ids.repeat(2, 1))
    assert torch.equal(added["text_embeds"], text.pooled)
    assert base.added_conditions(text, (32, 48))["time_ids"][0].tolist() == [32, 48, 0, 0, 32, 48]
    with torch.no_grad():
        base.unet(torch.zeros(2, 4, 16, 16), 1, text.hidden, added_cond_kwargs=added)


def test_sd_has_no_size_conditions():
    base = DiffusionBase.from_pipeline(tiny_sd(), name="tiny", digest="ab" * 32)
    assert base.added_conditions(base.encode_text(["road"]), (32, 32)) is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("pipeline_of", [tiny_sd, tiny_sdxl])
def test_noise_and_targets_equal_those_of_the_training_scheduler(pipeline_of, prediction):
    base = DiffusionBase.from_pipeline(pipeline_of(prediction), name="tiny", digest="ab" * 32)
    trainer = DDPMScheduler(
        **{name: value for name, value in SCHEDULE.items() if name != "steps_offset"}
    )
    generator = torch_generator(3)
    latents, noise = (torch.randn(4, 4, 8, 6, generator=generator) for _ in range(2))
    steps = torch.tensor([0, 1, 481, 999])
    assert torch.equal(
        base.add_noise(latents, noise, steps), trainer.add_noise(latents, noise, steps)
    )
    expected = {
        "epsilon": noise,
        "v_prediction": trainer.get_velocity(latents, noise, steps),
        "sample": latents,
    }
    assert torch.equal(base.target(latents, noise, steps), expected[prediction])


def test_the_schedule_of_stable_diffusion():
    base = DiffusionBase.from_pipeline(tiny_sd(), name="tiny", digest="ab" * 32)
    signal = base.alphas_cumprod.sqrt()[[1, 81, 201, 481]]
    assert signal.tolist() == pytest.approx([0.9991, 0.9577, 0.8673, 0.5498], abs=6e-5)
    assert (base.alphas_cumprod.shape, base.alphas_cumprod.dtype) == ((1000,), torch.float32)
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        get_alphas_cumprod(FlowMatchEulerDiscreteScheduler())


def test_moving_keeps_the_vae_of_sdxl_in_float32(caplog):
    for make, vae_type in ((tiny_sd, torch.bfloat16), (tiny_sdxl, torch.float32)):
        base = DiffusionBase.from_pipeline(make(), name="tiny", digest="ab" * 32)
        assert base.to("cpu", torch.bfloat16) is base
        assert (base.dtype, base.vae.dtype) == (torch.bfloat16, vae_type)
        assert {encoder.dtype for encoder in base.text_encoders} == {torch.bfloat16}
        assert base.encode_text(["road"]).hidden.dtype == torch.bfloat16
        images = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
        assert base.decode_latents(base.encode_images(images).bfloat16()).shape == images.shape
        assert base.to("cpu").dtype == torch.bfloat16
    assert not caplog.records


def test_other_pipelines_are_refused():
    pipeline = tiny_sd()
    with pytest.raises(ConfigError, match="is a SimpleNamespace, expected StableDiffusionPipeline"):
        DiffusionBase.from_pipeline(types.SimpleNamespace(), name="x", digest="ab" * 32)
    pipeline.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ConfigError, match="prediction_type 'flow', expected one of epsilon"):
        DiffusionBase.from_pipeline(pipeline, name="x", digest="ab" * 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, r"has \(9, 4\) input and output channels, the latents .* have 4"),
        ({"sample_size": [8, 16]}, "expected one integer"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    pipeline = tiny_sd()
    pipeline.unet.register_to_config(**changes)
    with pytest.raises(IntegrityError, match=message):
        DiffusionBase.from_pipeline(pipeline, name="x", digest="ab" * 32)


def test_encodings_are_immutable():
    text = TextEncoding(torch.zeros(2, 3, 4))
    assert text.pooled is None
    assert text.select([]).hidden.shape == (0, 3, 4)
