"""All supported schedulers: independence of the batch, stock noise levels, names and errors."""

import diffusers
import pytest
import torch

from loraseg.errors import ConfigError
from loraseg.synth.schedulers import SCHEDULER_ALIASES, SCHEDULERS, SchedulerSteps, scheduler_name
from tests.unit.tiny_diffusion import SCHEDULE

CPU = torch.device("cpu")
# diffusers converts arrays in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def pipeline_scheduler(prediction="epsilon", **settings):
    return diffusers.PNDMScheduler(
        **SCHEDULE,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        prediction_type=prediction,
        **settings,
    )


def run(name, seeds, prediction="epsilon", count=6, scheduler=None):
    steps = SchedulerSteps(scheduler or pipeline_scheduler(prediction), name, count, CPU)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = torch.stack([torch.randn(4, 3, 5, generator=g) for g in generators])
    latents = latents * steps.initial_scale
    for index in range(len(steps)):
        scaled = steps.scale_input(index, latents)
        latents = steps.step(index, 0.3 * scaled + scaled.sin(), latents, generators)
    return latents


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_does_not_depend_on_its_batch(name, prediction):
    before = torch.get_rng_state()
    alone, together = run(name, [7], prediction), run(name, [3, 7, 4], prediction)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)
    assert alone.isfinite().all()
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used


@pytest.mark.parametrize("alias", sorted(SCHEDULER_ALIASES))
def test_aliases_name_schedulers_of_diffusers(alias):
    name = scheduler_name(alias)
    assert name in SCHEDULERS
    assert issubclass(getattr(diffusers, name), diffusers.SchedulerMixin)
    assert scheduler_name(alias.upper()) == name


def test_the_schedule_of_the_pipeline_is_kept():
    scheduler = pipeline_scheduler("v_prediction")
    built = SchedulerSteps(scheduler, "ddim", 10, CPU)._scheduler
    assert built.config.prediction_type == "v_prediction"
    assert built.config.steps_offset == 1
    assert built.config.beta_schedule == "scaled_linear"
    torch.testing.assert_close(built.alphas_cumprod, scheduler.alphas_cumprod)
    assert scheduler.num_inference_steps is None  # the pipeline's scheduler is not changed


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"PNDMScheduler"}))
def test_noise_levels_are_those_of_stock_diffusers(name):
    """SD 1.4's config does not set the spacing; each class uses its default."""
    config = {**SCHEDULE, "skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False}
    scheduler = diffusers.PNDMScheduler.from_config(config)
    stock = getattr(diffusers, name).from_config(scheduler.config)
    stock.set_timesteps(10)
    assert torch.equal(SchedulerSteps(scheduler, name, 10, CPU)._timesteps, stock.timesteps)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_not_clipped(name):
    """diffusers clips by default if the pipeline's config is that of PNDM, which has no setting."""
    assert run(name, [1]).abs().max() > 1
    clipping = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=True)
    assert SchedulerSteps(clipping, name, 3, CPU)._scheduler.config.clip_sample is False
    assert clipping.config.clip_sample is True


def test_plms_has_one_more_unet_call_than_steps():
    for scheduler in (
        pipeline_scheduler(),
        diffusers.DDIMScheduler(**SCHEDULE, set_alpha_to_one=False),
    ):
        steps = SchedulerSteps(scheduler, "pndm", 50, CPU)
        assert len(steps) == 51
        times = [int(steps.timestep(index)) for index in range(len(steps))]
        assert times[:4] == [981, 961, 961, 941]
        assert times[-1] == 1
    assert len(SchedulerSteps(pipeline_scheduler(), "heun", 10, CPU)) == 19


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
def test_unknown_and_unsupported_names_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        scheduler_name(name)


def test_unsupported_settings_are_config_errors():
    with pytest.raises(ConfigError, match=r"PNDMScheduler: the model predicts 'sample'"):
        SchedulerSteps(pipeline_scheduler("sample"), "pndm", 5, CPU)
    with pytest.raises(ConfigError, match=r"DDIMScheduler with 2000 steps"):
        SchedulerSteps(pipeline_scheduler(), "ddim", 2000, CPU)
    for name in SCHEDULERS:
        with pytest.raises(ConfigError, match=r"expected fewer than the 1000 of training"):
            SchedulerSteps(pipeline_scheduler(), name, 1000, CPU)
