"""Every scheduler we offer: an image's steps do not depend on the batch, names are helpful."""

import diffusers
import pytest
import torch

from loraseg.errors import ConfigError
from loraseg.synth.schedulers import SCHEDULER_ALIASES, SCHEDULERS, SchedulerSteps, scheduler_name
from tests.unit.tiny_diffusion import SCHEDULE

CPU = torch.device("cpu")
# diffusers hands arrays to numpy in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def own(prediction="epsilon", **more):
    return diffusers.PNDMScheduler(
        **SCHEDULE,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        prediction_type=prediction,
        **more,
    )


def run(name, seeds, prediction="epsilon", steps=6, scheduler=None):
    plan = SchedulerSteps(scheduler or own(prediction), name, steps, CPU)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.stack([torch.randn(4, 3, 5, generator=g) for g in generators])
    latents = latents * plan.initial_scale
    for index in range(len(plan)):
        scaled = plan.scale_input(index, latents)
        latents = plan.step(index, 0.3 * scaled + scaled.sin(), latents, generators)
    return latents


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_does_not_depend_on_its_batch(name, prediction):
    before = torch.get_rng_state()
    alone, together = run(name, [7], prediction), run(name, [3, 7, 4], prediction)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)
    assert alone.isfinite().all()
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn from anywhere else


@pytest.mark.parametrize("alias", sorted(SCHEDULER_ALIASES))
def test_aliases_name_schedulers_that_diffusers_has(alias):
    name = scheduler_name(alias)
    assert name in SCHEDULERS
    assert issubclass(getattr(diffusers, name), diffusers.SchedulerMixin)
    assert scheduler_name(alias.upper()) == name


def test_the_schedule_of_the_pipeline_is_kept():
    scheduler = own("v_prediction")
    made = SchedulerSteps(scheduler, "ddim", 10, CPU)._scheduler
    assert made.config.prediction_type == "v_prediction"
    assert made.config.steps_offset == 1
    assert made.config.beta_schedule == "scaled_linear"
    torch.testing.assert_close(made.alphas_cumprod, scheduler.alphas_cumprod)
    assert scheduler.num_inference_steps is None  # the pipeline's own is not touched


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"PNDMScheduler"}))
def test_noise_levels_are_those_of_stock_diffusers(name):
    """SD 1.4's config says nothing of their spacing: each class has its own way."""
    said = {**SCHEDULE, "skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False}
    scheduler = diffusers.PNDMScheduler.from_config(said)
    stock = getattr(diffusers, name).from_config(scheduler.config)
    stock.set_timesteps(10)
    assert torch.equal(SchedulerSteps(scheduler, name, 10, CPU)._timesteps, stock.timesteps)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_not_clipped_as_if_they_were_pixels(name):
    """diffusers' default for a pipeline whose config comes from PNDM and does not say."""
    assert run(name, [1]).abs().max() > 1
    clipping = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=True)
    assert SchedulerSteps(clipping, name, 3, CPU)._scheduler.config.clip_sample is False
    assert clipping.config.clip_sample is True


def test_plms_calls_the_unet_once_more_than_it_has_steps():
    for scheduler in (own(), diffusers.DDIMScheduler(**SCHEDULE, set_alpha_to_one=False)):
        plan = SchedulerSteps(scheduler, "pndm", 50, CPU)
        assert len(plan) == 51
        times = [int(plan.timestep(index)) for index in range(len(plan))]
        assert times[:4] == [981, 961, 961, 941]
        assert times[-1] == 1
    assert len(SchedulerSteps(own(), "heun", 10, CPU)) == 19


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pmdn", r"'pmdn' is unknown; did you mean 'pndm'\? \(known: pndm, "),
        ("EulerDiscretScheduler", r"did you mean 'EulerDiscreteScheduler'"),
        ("ddimscheduler", r"did you mean 'DDIMScheduler'"),
        ("zzz", r"'zzz' is unknown \(known"),
        ("FlowMatchEulerDiscreteScheduler", r"is unknown; did you mean"),
        ("DPMSolverSDEScheduler", r"one noise for a whole batch"),
        ("EDMEulerScheduler", r"ignores the noise schedule"),
    ],
)
def test_names_that_cannot_be_used(name, message):
    with pytest.raises(ConfigError, match=message):
        scheduler_name(name)


def test_what_a_scheduler_cannot_do_is_a_config_error():
    with pytest.raises(ConfigError, match=r"PNDMScheduler: the model predicts 'sample'"):
        SchedulerSteps(own("sample"), "pndm", 5, CPU)
    with pytest.raises(ConfigError, match=r"DDIMScheduler with 2000 steps"):
        SchedulerSteps(own(), "ddim", 2000, CPU)
    for name in SCHEDULERS:
        with pytest.raises(ConfigError, match=r"expected fewer than the 1000 of training"):
            SchedulerSteps(own(), name, 1000, CPU)
