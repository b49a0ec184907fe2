"""The loss that diffusion models are trained by, for adapters and for whole models alike."""
# pyright: basic

import dataclasses
from contextlib import nullcontext
from typing import Literal

import torch

from loraseg.backbones.diffusion import DiffusionBase, TextEncoding
from loraseg.errors import ConfigError
from loraseg.synth.region_attention import RegionControl
from loraseg.synth.regions import Regions
from loraseg.tensor_types import Float, Int, Tensor

__all__ = ["DenoisingBatch", "LossConfig", "denoising_loss", "loss_weights"]

Precision = Literal["fp32", "bf16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """How errors at different noise levels are weighed.

    Attributes:
        weighting: "none" is the plain mean square. "min_snr" gives every level the weight of
            min(SNR, gamma) in terms of the clean latents (Hang et al. 2023).
        gamma: Where the weight stops to grow.
    """

    weighting: Literal["none", "min_snr"] = "none"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: ``gamma`` is not above 0.
        """
        if not 0 < self.gamma < float("inf"):
            raise ConfigError(f"gamma: got {self.gamma}, expected above 0")


_PLAIN = LossConfig()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DenoisingBatch:
    """All that the loss of b samples depends on besides the model; on the model's device.

    Attributes:
        latents: Clean and scaled.
        text: Encoded prompts, a row a sample.
        regions: What each place may look at; None for plain attention.
        timesteps: In [0, T).
        noise: Standard normal.
        size: Height and width of the images in pixels (SDXL is told).
    """

    latents: Float[Tensor, "b c y x"]
    text: TextEncoding
    regions: Regions | None
    timesteps: Int[Tensor, " b"]
    noise: Float[Tensor, "b c y x"]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.latents.shape[2], self.latents.shape[3]


def denoising_loss(
    base: DiffusionBase,
    batch: DenoisingBatch,
    control: RegionControl | None = None,
    config: LossConfig = _PLAIN,
    precision: Precision = "fp32",
) -> Float[Tensor, ""]:
    """Return the mean square error of the UNet's prediction, over all pixels (methods b.4).

    Args:
        base: Its UNet is run as it is, with whatever has been put into it.
        batch: Samples, noise and levels.
        control: Its processors are installed; needed for regions. With gradient checkpointing the
            caller sets the batch's regions around forward and backward once more.
        config: Weighting.
        precision: "bf16" runs the UNet under autocast; parameters and the loss stay float32.

    Raises:
        ConfigError: There are regions but no control.
    """
    if batch.regions is not None and control is None:
        raise ConfigError("denoising: a batch with regions needs a RegionControl, got none")
    dtype = base.dtype
    noisy = base.add_noise(batch.latents, batch.noise, batch.timesteps)
    acting = control.regions(batch.regions, latent=batch.latent_size) if control else nullcontext()
    low = torch.autocast(base.device.type, torch.bfloat16, enabled=precision == "bf16")
    with acting, low:
        predicted = base.unet(
            noisy.to(dtype),
            batch.timesteps,
            encoder_hidden_states=batch.text.hidden.to(dtype),
            added_cond_kwargs=base.added_conditions(batch.text, batch.size),
            return_dict=False,
        )[0]
    target = base.target(batch.latents, batch.noise, batch.timesteps)
    errors = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return (loss_weights(base, batch.timesteps, config) * errors).mean()


def loss_weights(
    base: DiffusionBase, timesteps: Int[Tensor, " b"], config: LossConfig
) -> Float[Tensor, " b"]:
    """Return each sample's weight, for errors in what the UNet predicts.

    With SNR = a / (1 - a), an error of epsilon is 1 / SNR as large an error of the clean latents,
    one of v 1 / (SNR + 1): so min(SNR, gamma) becomes min(SNR, gamma) / SNR and
    min(SNR, gamma) / (SNR + 1).
    """
    if config.weighting == "none":
        return torch.ones(len(timesteps), device=timesteps.device)
    signal = base.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = signal / (1 - signal)
    if base.prediction_type == "epsilon":
        return (config.gamma / snr).clamp(max=1.0)  # also where the SNR is zero
    capped = snr.clamp(max=config.gamma)
    return capped if base.prediction_type == "sample" else capped / (snr + 1)
