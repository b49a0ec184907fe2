"""The denoising loss against its formulas, written out in float64."""

import dataclasses

import pytest
import torch

from loraseg.backbones.diffusion import TextEncoding
from loraseg.errors import ConfigError
from loraseg.synth.region_attention import RegionControl
from loraseg.synth.regions import Regions
from loraseg.train.generator_adapters.denoising import (
    DenoisingBatch,
    LossConfig,
    denoising_loss,
    loss_weights,
)
from tests.unit.train.tiny_generator import tiny_generator

KINDS = [("sd", "epsilon"), ("sd", "v_prediction"), ("sd", "sample"), ("sdxl", "epsilon")]


def batch_for(base, count=3, regions=None):
    generator = torch.Generator().manual_seed(1)
    text = base.encode_text(["road sky", "car", ""][:count])
    shape = (count, 4, 16, 16)
    return DenoisingBatch(
        latents=torch.randn(shape, generator=generator),
        text=text,
        regions=regions,
        timesteps=torch.tensor([3, 400, 990])[:count],
        noise=torch.randn(shape, generator=generator),
        size=(32, 32),
    )


def predicted(base, batch):
    signal = base.alphas_cumprod.double()[batch.timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * batch.latents.double() + (1 - signal).sqrt() * batch.noise.double()
    added = None
    if base.kind == "sdxl":
        ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * len(batch.latents))
        added = {"text_embeds": batch.text.pooled, "time_ids": ids}
    with torch.no_grad():
        return base.unet(
            noisy.float(), batch.timesteps, batch.text.hidden, added_cond_kwargs=added
        ).sample


def wanted(base, batch):
    signal = base.alphas_cumprod.double()[batch.timesteps].view(-1, 1, 1, 1)
    clean, noise = batch.latents.double(), batch.noise.double()
    return {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * clean,
    }[base.prediction_type]


@pytest.mark.parametrize(("kind", "prediction"), KINDS)
def test_the_loss_is_the_mean_squared_error_of_the_schedulers_target(kind, prediction):
    base = tiny_generator(kind, prediction)
    batch = batch_for(base)
    expected = (predicted(base, batch).double() - wanted(base, batch)).square().mean()
    with torch.no_grad():
        loss = denoising_loss(base, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("kind", "prediction"), KINDS)
def test_min_snr_weights_errors_of_the_clean_latents(kind, prediction):
    base = tiny_generator(kind, prediction)
    batch = batch_for(base)
    signal = base.alphas_cumprod.double()[batch.timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * batch.latents.double() + (1 - signal).sqrt() * batch.noise.double()
    output = predicted(base, batch).double()
    clean = {
        "epsilon": lambda: (noisy - (1 - signal).sqrt() * output) / signal.sqrt(),
        "sample": lambda: output,
        "v_prediction": lambda: signal.sqrt() * noisy - (1 - signal).sqrt() * output,
    }[prediction]()
    snr = (signal / (1 - signal)).flatten()
    errors = (clean - batch.latents.double()).square().flatten(1).mean(1)
    expected = (snr.clamp(max=5.0) * errors).mean()
    with torch.no_grad():
        loss = denoising_loss(base, batch, config=LossConfig(weighting="min_snr"))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_weights_are_one_without_weighting():
    base = tiny_generator()
    assert loss_weights(base, torch.tensor([0, 999]), LossConfig()).tolist() == [1.0, 1.0]


def test_a_level_without_signal_has_a_finite_weight():
    base = dataclasses.replace(tiny_generator(), alphas_cumprod=torch.tensor([0.5, 0.0]))
    config = LossConfig(weighting="min_snr")
    assert loss_weights(base, torch.tensor([0, 1]), config).tolist() == [1.0, 1.0]


def test_regions_work_through_the_control_and_open_ones_change_nothing():
    base = tiny_generator()
    labels = torch.arange(2, dtype=torch.uint8).repeat(32, 16)[None].repeat(3, 1, 1)
    closed = torch.full((3, 77), -1)
    closed[:, 1] = 0
    closed[:, 2] = 1
    losses = []
    control = RegionControl(base.unet)
    for tokens in (None, torch.full((3, 77), -1), closed):
        regions = None if tokens is None else Regions(labels, tokens)
        with torch.no_grad(), control.installed():
            losses.append(float(denoising_loss(base, batch_for(base, regions=regions), control)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert abs(losses[2] - losses[0]) > 1e-6


def test_regions_need_a_control():
    base = tiny_generator()
    regions = Regions(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((3, 77), -1))
    with pytest.raises(ConfigError, match="needs a RegionControl"):
        denoising_loss(base, batch_for(base, regions=regions))


def test_gradients_reach_the_whole_unet_in_bf16():
    base = tiny_generator()
    base.unet.requires_grad_(True)
    loss = denoising_loss(base, batch_for(base), precision="bf16")
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in base.unet.parameters())


def test_text_rows_belong_to_samples():
    base = tiny_generator()
    batch = batch_for(base)
    swapped = dataclasses.replace(batch, text=TextEncoding(batch.text.hidden.flip(0)))
    with torch.no_grad():
        assert denoising_loss(base, batch) != denoising_loss(base, swapped)


def test_gammas_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="gamma: got 0"):
        LossConfig(gamma=0.0)
