# pyright: basic
"""From noise to latents: one batch of images through all steps of a scheduler (methods b.5, d.5).

What does not change from step to step is computed once: the text of a prompt, its keys and values
in every cross-attention module, the masks, and the timesteps on the device. Everything else is
what the stock pipelines do, in their order of operations.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from loraseg.backbones.diffusion import DiffusionBase, TextEncoding
from loraseg.errors import ConfigError, StageError
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
    """How images are sampled.

    Attributes:
        images: K, images per mask.
        steps: Steps of the scheduler; PLMS calls the UNet once more often than that.
        guidance: Scale of classifier-free guidance, at least 1; at 1 there is no unconditional
            half.
        scheduler: A class of diffusers or a short alias, see :mod:`loraseg.synth.schedulers`.
        seed: The job's one seed.
        batch: Images per call of the UNet; with guidance it gets twice as many rows.
        size: Height and width of the images; None for those of the mask.
        decode_slice: Images that the VAE decodes at once.
        precision: Number type of the base.
        regions: Region attention; off, only the prompt says what is in the mask.
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
    """The noise of one image: a stream of its own, whatever else is made beside it."""

    def __init__(self, seed: int, mask_id: str, k: int) -> None:
        self.seed = derive(seed, "synth", mask_id, k)
        self.generator = torch.Generator().manual_seed(self.seed)

    def initial(self, shape: tuple[int, int, int]) -> Float[Tensor, "c y x"]:
        """Draw what the image starts from: float32 on the CPU, whatever the base computes in."""
        return torch.randn(shape, generator=self.generator)


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """What b images are made of.

    Attributes:
        noise: Unit noise, (b, c, y, x) in the size of the latents.
        text: Of n distinct prompts.
        prompts: Which of them each image has.
        unconditional: The one row for guidance; None without guidance.
        generators: One an image, for schedulers that add noise on the way.
        regions: Of the b images; None for attention to the whole prompt everywhere.
        shared_text: Rows of one prompt have the same keys and values. Not so where adapters
            differ from image to image.
    """

    noise: Float[Tensor, "b c y x"]
    text: TextEncoding
    prompts: tuple[int, ...]
    unconditional: TextEncoding | None
    generators: Sequence[torch.Generator]
    regions: Regions | None = None
    shared_text: bool = True


class PromptCache:
    """Encoded prompts; each goes through the text encoders once while it is remembered."""

    def __init__(self, base: DiffusionBase, limit: int = 1024) -> None:
        self._base = base
        self._limit = limit
        self._encodings: OrderedDict[str, TextEncoding] = OrderedDict()
        self._unconditional: TextEncoding | None = None

    def encode(self, prompts: Sequence[str]) -> TextEncoding:
        """Return the encodings of prompts, one row each."""
        # One by one: what a prompt is encoded with must not change it in its last digits.
        found = [self._encode_one(prompt) for prompt in prompts]
        pooled = [one.pooled for one in found if one.pooled is not None]
        return TextEncoding(
            torch.cat([one.hidden for one in found]), torch.cat(pooled) if pooled else None
        )

    @property
    def unconditional(self) -> TextEncoding:
        """The one row for "no prompt"."""
        if self._unconditional is None:
            self._unconditional = self._base.encode_unconditional()
        return self._unconditional

    def _encode_one(self, prompt: str) -> TextEncoding:
        if prompt not in self._encodings:
            self._encodings[prompt] = self._base.encode_text([prompt])
            while len(self._encodings) > self._limit:
                self._encodings.popitem(last=False)
        self._encodings.move_to_end(prompt)
        return self._encodings[prompt]


@torch.no_grad()
def denoise(
    base: DiffusionBase, control: RegionControl, batch: SamplingBatch, config: SamplingConfig
) -> Float[Tensor, "b c y x"]:
    """Return the latents of a batch after all steps.

    Args:
        base: With the adapters of the batch acting in its UNet.
        control: Of the same UNet; its processors are in place meanwhile.
        batch: All of one size.
        config: Steps, guidance and scheduler are taken from it.

    Raises:
        ConfigError: The scheduler does not fit.
        StageError: Other attention processors are in place, or the latents are not finite.
    """
    images, guided = len(batch.noise), batch.unconditional is not None
    steps = SchedulerSteps(base.scheduler, config.scheduler, config.steps, base.device)
    text, index = _text_rows(batch)
    rows = text.select(index.tolist())
    height, width = batch.noise.shape[2:]
    size = height * base.latent_factor, width * base.latent_factor
    added = base.added_conditions(rows, size)
    hidden = rows.hidden if not batch.shared_text else text.hidden
    where = index if batch.shared_text else torch.arange(len(index))
    latents = batch.noise.to(base.device, base.dtype) * steps.initial_scale
    with (
        control.installed(),
        control.cached_text(hidden, where),
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
                plain, conditional = predicted.chunk(2)
                predicted = plain + config.guidance * (conditional - plain)
            latents = steps.step(step, predicted, latents, batch.generators)
    if not bool(torch.isfinite(latents).all()):
        raise StageError(
            f"sampling gave values that are not finite with {config.scheduler}, {config.steps} "
            f"steps, guidance {config.guidance} in {config.precision}; try another scheduler, "
            "fewer steps or fp32"
        )
    return latents


def _text_rows(batch: SamplingBatch) -> tuple[TextEncoding, Tensor]:
    """Return the distinct rows of text, and which of them each row of the UNet's batch has."""
    index = list(batch.prompts)
    if batch.unconditional is None:
        return batch.text, torch.tensor(index)
    empty, text = batch.unconditional, batch.text
    pooled = None
    if empty.pooled is not None and text.pooled is not None:
        pooled = torch.cat([empty.pooled, text.pooled])
    distinct = TextEncoding(torch.cat([empty.hidden, text.hidden]), pooled)
    return distinct, torch.tensor([0] * len(index) + [1 + one for one in index])
