"""The denoising loss of diffusion models, for adapters and for full fine-tuning."""

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
    """Weights of the noise levels.

    Attributes:
        weighting: "none" weights all levels equally. "min_snr" weights the error of the clean
            latents by min(SNR, gamma) (Hang et al., Min-SNR Weighting, ICCV 2023).
        gamma: Largest weight.
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
    """Inputs of the loss for b samples, on the model's device.

    Attributes:
        latents: Clean, scaled latents.
        text: Encoded prompts, one row per sample.
        regions: Classes of pixels and tokens for rectified attention; None for plain attention.
        timesteps: Noise levels in [0, T).
        noise: Standard normal noise.
        size: Height and width of the images in pixels, a condition of SDXL.
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
    """Return the mean squared error of the UNet's prediction over all latent pixels, as MatchMask.

    Args:
        base: The generator, with the adapters that are applied to its UNet.
        batch: Samples, noise and noise levels.
        control: The installed attention control; required for regions. With gradient checkpointing
            the caller must also set the batch's regions around forward and backward.
        config: Weights of the noise levels.
        precision: "bf16" runs the UNet under autocast; parameters and the loss stay float32.

    Raises:
        ConfigError: There are regions but no control.
    """
    if batch.regions is not None and control is None:
        raise ConfigError("denoising: a batch with regions needs a RegionControl, got none")
    dtype = base.dtype
    noisy = base.add_noise(batch.latents, batch.noise, batch.timesteps)
    regions = control.regions(batch.regions, latent=batch.latent_size) if control else nullcontext()
    low = torch.autocast(base.device.type, torch.bfloat16, enabled=precision == "bf16")
    with regions, low:
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
    """Return the weight of each sample's squared error in the space of the UNet's prediction.

    With SNR = a / (1 - a), a squared error of epsilon is SNR times that of the clean latents, and
    one of v is SNR + 1 times that. The weight min(SNR, gamma) of the latter thus becomes
    min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v.
    """
    if config.weighting == "none":
        return torch.ones(len(timesteps), device=timesteps.device)
    signal = base.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = signal / (1 - signal)
    if base.prediction_type == "epsilon":
        return (config.gamma / snr).clamp(max=1.0)  # Also right where the SNR is zero.
    capped = snr.clamp(max=config.gamma)
    return capped if base.prediction_type == "sample" else capped / (snr + 1)
