# pyright: basic
"""diffusers' schedulers by name, made from a pipeline's own noise schedule (methods d.5).

Why a list and not any class of diffusers: a scheduler of flow matching or of another noise schedule
builds from the same config without a word and then gives noise. Those below read the schedule and
the prediction type of Stable Diffusion, and draw what noise they need from the generators that
they are given, so that an image does not depend on the batch it is made in.
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
# Why a scheduler of diffusers for Stable Diffusion is not among ours.
_UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "DPMSolverSDEScheduler": "it draws one noise for a whole batch, so that an image would "
        "depend on the others of its batch; take DPMSolverMultistepScheduler",
        "EDMEulerScheduler": "it ignores the noise schedule of the pipeline",
    }
)


class SchedulerSteps:
    """The steps of one batch from noise to latents, on one scheduler of its own."""

    def __init__(
        self, pipeline_scheduler: Any, name: str, steps: int, device: torch.device
    ) -> None:
        """Make a fresh scheduler.

        Args:
            pipeline_scheduler: The pipeline's scheduler; it is only read.
            name: As :func:`scheduler_name` knows it.
            steps: Steps that are asked for; some schedulers call the UNet more often.
            device: Where the UNet wants its timesteps.

        Raises:
            ConfigError: The name is unknown, or the scheduler cannot do this.
        """
        self._scheduler = _build_scheduler(pipeline_scheduler, scheduler_name(name), steps)
        # The scheduler computes with timesteps on the CPU, where its tables are: on a GPU every
        # look-up by a timestep of the device would wait for all the work that is queued.
        self._timesteps: Int[Tensor, " t"] | Float[Tensor, " t"] = self._scheduler.timesteps
        self._device_timesteps = self._timesteps.to(device)
        self._takes_generators = "generator" in inspect.signature(self._scheduler.step).parameters

    def __len__(self) -> int:
        """How often the UNet is called."""
        return len(self._timesteps)

    @property
    def initial_scale(self) -> float | Tensor:
        """What unit noise is multiplied with before the first step."""
        return self._scheduler.init_noise_sigma

    def timestep(self, index: int) -> Tensor:
        """Return the timestep of a step for the UNet, a scalar on its device."""
        return self._device_timesteps[index]

    def scale_input(
        self, index: int, latents: Float[Tensor, "b c y x"]
    ) -> Float[Tensor, "b c y x"]:
        """Return the latents as the UNet wants them."""
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
            predicted: What the UNet said, guidance applied.
            latents: Before the step.
            generators: One a sample, on the CPU; those schedulers that add noise draw from them.
        """
        more = {"generator": list(generators)} if self._takes_generators else {}
        return self._scheduler.step(
            predicted, self._timesteps[index], latents, return_dict=False, **more
        )[0]


def scheduler_name(name: str) -> str:
    """Return the class name for a class name or short alias.

    Raises:
        ConfigError: It is unknown, or a scheduler that cannot be used, with the reason.
    """
    found = SCHEDULER_ALIASES.get(name.lower(), name)
    if found in SCHEDULERS:
        return found
    if found in _UNSUPPORTED:
        raise ConfigError(f"scheduler {name!r}: {_UNSUPPORTED[found]}")
    known = (*SCHEDULER_ALIASES, *SCHEDULERS)
    folded = {one.casefold(): one for one in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
    raise ConfigError(f"scheduler {name!r} is unknown{hint} (known: {', '.join(known)})")


def _build_scheduler(pipeline_scheduler: Any, name: str, steps: int) -> Any:
    prepare_torchvision()
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None:
        raise ConfigError(f"scheduler {name!r}: diffusers {diffusers.__version__} has none")
    trained = int(pipeline_scheduler.config["num_train_timesteps"])
    if steps >= trained:
        raise ConfigError(
            f"scheduler {name} with {steps} steps: expected fewer than the {trained} of training"
        )
    config, known = dict(pipeline_scheduler.config), inspect.signature(cls.__init__).parameters
    if type(pipeline_scheduler).__name__ != name:
        # What the pipeline leaves to its own class is left to the new one, as diffusers does, but
        # for the offset, which stock pipelines set: noise levels are spaced as the class likes.
        unsaid = set(config.get("_use_default_values", ())) - {"steps_offset"}
        config = {key: value for key, value in config.items() if key not in unsaid}
        # PLMS is PNDM without its Runge-Kutta start; configs of other classes do not say so.
        config = {"skip_prk_steps": True, **config}
    # As the stock pipeline has it, whatever a config says: latents are not pixels in [-1, 1].
    config["clip_sample"] = False
    # Settings of other classes are no news to anybody.
    config = {key: value for key, value in config.items() if key in known}
    try:
        with warnings.catch_warnings():
            # diffusers hands tensors to numpy in a way that numpy 2 warns of.
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
            "take ddim"
        )
    return scheduler
