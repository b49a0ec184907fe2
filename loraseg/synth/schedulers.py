"""Schedulers of diffusers by name, built from the noise schedule of a pipeline.

Why a list and not any class of diffusers: a scheduler for flow matching or for another noise
schedule is built from the same config without an error and then produces noise. The schedulers
below use the noise schedule and the prediction type of Stable Diffusion, and draw noise only from
the generators passed to them, so that an image does not depend on its batch.
"""

import difflib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from loraseg.compat import prepare_torchvision
from loraseg.errors import ConfigError
from loraseg.tensor_types import Float, Int, Tensor

__all__ = ["SCHEDULERS", "SCHEDULER_ALIASES", "SchedulerSteps", "scheduler_name"]

SCHEDULERS = (
    "PNDMScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
SCHEDULER_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "pndm": "PNDMScheduler",
        "plms": "PNDMScheduler",
        "ddim": "DDIMScheduler",
        "ddpm": "DDPMScheduler",
        "deis": "DEISMultistepScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
        "euler": "EulerDiscreteScheduler",
        "euler-a": "EulerAncestralDiscreteScheduler",
        "heun": "HeunDiscreteScheduler",
        "lms": "LMSDiscreteScheduler",
        "unipc": "UniPCMultistepScheduler",
    }
)
# Reasons why schedulers of diffusers for Stable Diffusion are not supported.
_UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "DPMSolverSDEScheduler": "it draws one noise for a whole batch, so that an image would "
        "depend on the others of its batch; use DPMSolverMultistepScheduler",
        "EDMEulerScheduler": "it ignores the noise schedule of the pipeline",
    }
)


class SchedulerSteps:
    """The steps of one batch from noise to latents, with a scheduler instance of its own."""

    def __init__(
        self, pipeline_scheduler: Any, name: str, steps: int, device: torch.device
    ) -> None:
        """Build the scheduler.

        Args:
            pipeline_scheduler: The pipeline's scheduler; it is only read.
            name: A name that :func:`scheduler_name` accepts.
            steps: Requested number of steps; some schedulers call the UNet more often.
            device: Device of the UNet.

        Raises:
            ConfigError: The name is unknown, or the scheduler does not support the settings.
        """
        self._scheduler = _build_scheduler(pipeline_scheduler, scheduler_name(name), steps)
        # The scheduler gets timesteps on the CPU, where its tables are: indexing a table with a
        # timestep on the GPU would wait for all queued work.
        self._timesteps: Int[Tensor, " t"] | Float[Tensor, " t"] = self._scheduler.timesteps
        self._device_timesteps = self._timesteps.to(device)
        self._takes_generators = "generator" in inspect.signature(self._scheduler.step).parameters

    def __len__(self) -> int:
        """Return the number of UNet calls."""
        return len(self._timesteps)

    @property
    def initial_scale(self) -> float | Tensor:
        """Factor (a scalar) by which unit noise is multiplied before the first step."""
        return self._scheduler.init_noise_sigma

    def timestep(self, index: int) -> Tensor:
        """Return the timestep of a step, a scalar tensor () on the UNet's device."""
        return self._device_timesteps[index]

    def scale_input(
        self, index: int, latents: Float[Tensor, "b c y x"]
    ) -> Float[Tensor, "b c y x"]:
        """Return the latents scaled for the UNet's input at a step."""
        return self._scheduler.scale_model_input(latents, self._timesteps[index])

    def step(
        self,
        index: int,
        predicted: Float[Tensor, "b c y x"],
        latents: Float[Tensor, "b c y x"],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "b c y x"]:
        """Return the latents after a step.

        Args:
            index: 0 to ``len(self)`` - 1, in order.
            predicted: The UNet's prediction, with guidance applied.
            latents: The latents before the step.
            generators: One per sample, on the CPU; schedulers that add noise draw from them.
        """
        kwargs = {"generator": list(generators)} if self._takes_generators else {}
        return self._scheduler.step(
            predicted, self._timesteps[index], latents, return_dict=False, **kwargs
        )[0]


def scheduler_name(name: str) -> str:
    """Return the class name for a class name or short alias.

    Raises:
        ConfigError: The scheduler is unknown, or not supported for a stated reason.
    """
    class_name = SCHEDULER_ALIASES.get(name.lower(), name)
    if class_name in SCHEDULERS:
        return class_name
    if class_name in _UNSUPPORTED:
        raise ConfigError(f"scheduler {name!r}: {_UNSUPPORTED[class_name]}")
    accepted = (*SCHEDULER_ALIASES, *SCHEDULERS)
    folded = {accepted_name.casefold(): accepted_name for accepted_name in accepted}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
    raise ConfigError(f"scheduler {name!r} is unknown{hint} (known: {', '.join(accepted)})")


def _build_scheduler(pipeline_scheduler: Any, name: str, steps: int) -> Any:
    prepare_torchvision()
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None:
        raise ConfigError(f"scheduler {name!r}: missing in diffusers {diffusers.__version__}")
    trained = int(pipeline_scheduler.config["num_train_timesteps"])
    if steps >= trained:
        raise ConfigError(
            f"scheduler {name} with {steps} steps: expected fewer than the {trained} of training"
        )
    config, parameters = dict(pipeline_scheduler.config), inspect.signature(cls.__init__).parameters
    if type(pipeline_scheduler).__name__ != name:
        # As in diffusers, values that are defaults of the pipeline's class are left to the defaults
        # of the new class, except for the offset, which stock pipelines set.
        defaults = set(config.get("_use_default_values", ())) - {"steps_offset"}
        config = {key: value for key, value in config.items() if key not in defaults}
        # PLMS is PNDM without its Runge-Kutta start; configs of other classes lack this key.
        config = {"skip_prk_steps": True, **config}
    # As in the stock pipeline, regardless of the config: latents are not pixels in [-1, 1].
    config["clip_sample"] = False
    # Settings of other classes would cause a warning.
    config = {key: value for key, value in config.items() if key in parameters}
    try:
        with warnings.catch_warnings():
            # diffusers converts tensors to numpy arrays in a way that numpy 2 warns about.
            warnings.simplefilter("ignore", DeprecationWarning)
            scheduler = cls.from_config(config)
            scheduler.set_timesteps(steps)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"scheduler {name} with {steps} steps: {error}") from error
    supported = ("epsilon", "v_prediction")
    kind = pipeline_scheduler.config.get("prediction_type", "epsilon")
    if name == "PNDMScheduler" and kind not in supported:
        raise ConfigError(
            f"scheduler {name}: the model predicts {kind!r}, expected {' or '.join(supported)}; "
            "use ddim"
        )
    return scheduler
