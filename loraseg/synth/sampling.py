"""Sampling: one batch of images from noise to latents through all steps of a scheduler.

What is constant over the steps is computed once: the text encodings, their keys and values in
every cross-attention module, the masks, and the timesteps on the device. Everything else follows
the order of operations of diffusers' ``StableDiffusionPipeline.__call__``. The defaults (5 images
per mask, 50 steps of PLMS, guidance 2) are those of MatchMask (CVPR 2026).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from loraseg.backbones.diffusion import DiffusionBase, TextEncoding
from loraseg.errors import ConfigError, StageError
from loraseg.lru_cache import LruCache
from loraseg.seeding import derive
from loraseg.synth.region_attention import RegionControl
from loraseg.synth.regions import Regions
from loraseg.synth.schedulers import SchedulerSteps, scheduler_name
from loraseg.tensor_types import Float, Tensor

__all__ = ["NoiseStream", "PromptCache", "SamplingBatch", "SamplingConfig", "denoise"]

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Settings of sampling.

    Attributes:
        images: K, images per mask.
        steps: Steps of the scheduler; PLMS calls the UNet ``steps + 1`` times.
        guidance: Scale of classifier-free guidance, at least 1; at 1 there is no unconditional
            half.
        scheduler: A class of diffusers or a short alias, see :mod:`loraseg.synth.schedulers`.
        seed: The seed of the job.
        batch: Images per call of the UNet; with guidance it gets twice as many rows.
        size: Height and width of the images, pixels; None for the size of the mask.
        decode_slice: Images that the VAE decodes together.
        precision: Dtype of the base.
        regions: Whether to use region attention; otherwise only the prompt describes the mask.

    Raises:
        ConfigError: A value is out of range.
    """

    images: int = 5
    steps: int = 50
    guidance: float = 2.0
    scheduler: str = "pndm"
    seed: int = 0
    batch: int = 8
    size: tuple[int, int] | None = None
    decode_slice: int = 4
    precision: Precision = "fp32"
    regions: bool = True

    def __post_init__(self) -> None:
        for name in ("images", "steps", "batch", "decode_slice"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not 1 <= self.guidance < float("inf"):
            raise ConfigError(f"guidance: got {self.guidance}, expected a finite number from 1")
        if self.precision not in DTYPES:
            raise ConfigError(f"precision: got {self.precision!r}, expected fp32 or bf16")
        if self.size is not None and min(self.size) < 1:
            raise ConfigError(f"size: got {self.size}, expected height and width of at least 1")
        scheduler_name(self.scheduler)


class NoiseStream:
    """The random stream of one image, independent of the batch that contains the image."""

    def __init__(self, seed: int, mask_id: str, k: int) -> None:
        self.seed = derive(seed, "synth", mask_id, k)
        self.generator = torch.Generator().manual_seed(self.seed)

    def initial(self, shape: tuple[int, int, int]) -> Float[Tensor, "c y x"]:
        """Draw the initial noise (c, y, x): float32 on the CPU for every dtype of the base."""
        return torch.randn(shape, generator=self.generator)


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """The inputs of b images.

    Attributes:
        noise: Unit noise (b, c, y, x) in the size of the latents.
        text: Encodings of n distinct prompts.
        prompts: Row of ``text`` for each image.
        unconditional: Encoding (one row) of the unconditional half; None without guidance.
        generators: One per image, for schedulers that add noise at each step.
        regions: Regions of the b images; None for plain attention.
        shared_text: Whether images with one prompt share keys and values. False if the adapters
            differ between images.
    """

    noise: Float[Tensor, "b c y x"]
    text: TextEncoding
    prompts: tuple[int, ...]
    unconditional: TextEncoding | None
    generators: Sequence[torch.Generator]
    regions: Regions | None = None
    shared_text: bool = True


class PromptCache:
    """Least-recently-used cache of encoded prompts."""

    def __init__(self, base: DiffusionBase, limit: int = 1024) -> None:
        self._base = base
        self._encodings: LruCache[str, TextEncoding] = LruCache(limit)
        self._unconditional: TextEncoding | None = None

    def encode(self, prompts: Sequence[str]) -> TextEncoding:
        """Return the encodings of prompts, one row each."""
        # One call per prompt: the batch of a prompt must not change the last bits of its encoding.
        encodings = [
            self._encodings.get_or_create(prompt, partial(self._base.encode_text, [prompt]))
            for prompt in prompts
        ]
        pooled = [encoding.pooled for encoding in encodings if encoding.pooled is not None]
        return TextEncoding(
            torch.cat([encoding.hidden for encoding in encodings]),
            torch.cat(pooled) if pooled else None,
        )

    @property
    def unconditional(self) -> TextEncoding:
        """Encoding of the unconditional prompt, one row."""
        if self._unconditional is None:
            self._unconditional = self._base.encode_unconditional()
        return self._unconditional


@torch.no_grad()
def denoise(
    base: DiffusionBase, control: RegionControl, batch: SamplingBatch, config: SamplingConfig
) -> Float[Tensor, "b c y x"]:
    """Run all steps of the scheduler and return the final latents.

    Guidance: ``eps = eps_u + g (eps_c - eps_u)`` (Ho and Salimans, classifier-free guidance,
    arXiv 2207.12598, eq. 6 with g = 1 + w).

    Args:
        base: The base, with the adapters of the batch applied to its UNet.
        control: Region control of the same UNet; installed during the call.
        batch: Inputs of b images of one size.
        config: Steps, guidance and scheduler are read from it.

    Returns:
        (b, c, y, x) latents in the dtype of the base.

    Raises:
        ConfigError: The scheduler does not support these settings.
        StageError: Other attention processors are installed, or the latents are not finite.
    """
    images, guided = len(batch.noise), batch.unconditional is not None
    steps = SchedulerSteps(base.scheduler, config.scheduler, config.steps, base.device)
    text, index = _text_rows(batch)
    rows = text.select(index.tolist())
    height, width = batch.noise.shape[2:]
    size = height * base.latent_factor, width * base.latent_factor
    added = base.added_conditions(rows, size)
    hidden = rows.hidden if not batch.shared_text else text.hidden
    hidden_index = index if batch.shared_text else torch.arange(len(index))
    latents = batch.noise.to(base.device, base.dtype) * steps.initial_scale
    with (
        control.installed(),
        control.cached_text(hidden, hidden_index),
        control.regions(
            batch.regions, unconditional=images if guided else 0, latent=(height, width)
        ),
    ):
        for step in range(len(steps)):
            scaled = steps.scale_input(step, latents)
            predicted = base.unet(
                torch.cat([scaled, scaled]) if guided else scaled,
                steps.timestep(step),
                encoder_hidden_states=rows.hidden,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
            if guided:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + config.guidance * (conditional - unconditional)
            latents = steps.step(step, predicted, latents, batch.generators)
    if not bool(torch.isfinite(latents).all()):
        raise StageError(
            f"sampling gave values that are not finite with {config.scheduler}, {config.steps} "
            f"steps, guidance {config.guidance} in {config.precision}; try another scheduler, "
            "fewer steps or fp32"
        )
    return latents


def _text_rows(batch: SamplingBatch) -> tuple[TextEncoding, Tensor]:
    """Return the distinct text rows, and the index of one for each row of the UNet's batch."""
    index = list(batch.prompts)
    if batch.unconditional is None:
        return batch.text, torch.tensor(index)
    empty, text = batch.unconditional, batch.text
    pooled = None
    if empty.pooled is not None and text.pooled is not None:
        pooled = torch.cat([empty.pooled, text.pooled])
    distinct = TextEncoding(torch.cat([empty.hidden, text.hidden]), pooled)
    return distinct, torch.tensor([0] * len(index) + [1 + row for row in index])
