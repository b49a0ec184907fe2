"""Batches of the denoising loss, each a pure function of (seed, keys, step)."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from loraseg.backbones.diffusion import DiffusionBase, TextEncoding
from loraseg.errors import ConfigError
from loraseg.seeding import numpy_generator, torch_generator
from loraseg.synth.conditioning import Conditioner, Downsampling
from loraseg.synth.regions import Regions
from loraseg.tensor_types import Float, Tensor, UInt8, ndarray
from loraseg.train.core.shuffling import shuffled_index
from loraseg.train.generator_adapters.crops import Crop, CroppedImages
from loraseg.train.generator_adapters.denoising import DenoisingBatch
from loraseg.train.generator_adapters.latents import TensorCache, cached_latents, cached_text

__all__ = ["CropConditions", "DenoisingData", "DrawConfig", "SampleDraw"]

_CACHE_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DrawConfig:
    """Random choices for every sample of a batch.

    Attributes:
        flip: Probability of a horizontal flip.
        caption_dropout: Probability of the empty prompt without regions.
        regions: Use rectified attention: pixels attend to the words of their own class only
            (FreestyleNet, which MatchMask builds on).
    """

    flip: float = 0.5
    caption_dropout: float = 0.0
    regions: bool = True

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A probability is outside [0, 1].
        """
        for field in ("flip", "caption_dropout"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"{field}: got {getattr(self, field)}, expected in [0, 1]")


@dataclasses.dataclass(frozen=True, slots=True)
class SampleDraw:
    """The random choices of one sample.

    Attributes:
        crop: Index of the crop.
        flipped: Whether it is flipped horizontally.
        captioned: Whether it has its prompt; otherwise the empty one.
        timestep: Noise level.
        keys: Keys of the noise's random stream.
    """

    crop: int
    flipped: bool
    captioned: bool
    timestep: int
    keys: tuple[str | int, ...]


class CropConditions:
    """Prompts and regions of crops. Regions beyond 2 GiB of memory are recomputed on each use."""

    def __init__(self, crops: CroppedImages, conditioner: Conditioner) -> None:
        """Read every mask, so that unusable ones fail before anything is encoded.

        Raises:
            DatasetError: A file is broken, or a mask has unknown ids or no labelled pixel.
        """
        self._crops, self._conditioner = crops, conditioner
        self.downsampling: Downsampling = conditioner.config.downsampling
        numbers: dict[str, int] = {}
        self._prompts: list[int] = []
        self._tokens: list[ndarray] = []
        self._cache: dict[int, ndarray] = {}
        kept_bytes = 0
        for index, crop in enumerate(crops.crops):
            condition = conditioner(crops.load(crop)[1], where=_mask_name(crop))
            self._prompts.append(numbers.setdefault(condition.prompt, len(numbers)))
            self._tokens.append(condition.token_classes)
            if kept_bytes + condition.regions.nbytes <= _CACHE_BYTES:
                self._cache[index] = condition.regions
                kept_bytes += condition.regions.nbytes
        self.prompts = tuple(numbers)

    def prompt_index(self, crop: int) -> int:
        """Return the index of a crop's prompt in :attr:`prompts`."""
        return self._prompts[crop]

    def token_classes(self, crop: int, *, captioned: bool) -> ndarray:
        """Return the class id (or -1) of each token of the prompt, or of the empty prompt."""
        tokens = self._tokens[crop]
        return tokens if captioned else np.full_like(tokens, -1)

    def regions(self, crop: int, *, flipped: bool) -> UInt8[ndarray, "h w"]:
        """Return the class id of each pixel of a crop."""
        regions = self._cache.get(crop)
        if regions is None:
            key = self._crops.crops[crop]
            regions = self._conditioner(self._crops.load(key)[1], where=_mask_name(key)).regions
        return np.ascontiguousarray(regions[:, ::-1]) if flipped else regions


class DenoisingData:
    """Latents, encoded prompts and regions of crops in host memory; makes the batches of steps."""

    def __init__(
        self,
        latents: Float[Tensor, "n f c y x"],
        text: TextEncoding,
        conditions: CropConditions,
        crops: CroppedImages,
        draw_config: DrawConfig,
        noise_levels: int,
    ) -> None:
        """Take the results of :meth:`prepare`.

        Args:
            latents: Latents of each crop and, with f = 2, of its mirror image.
            text: One row per prompt of the conditions and a last one for the empty prompt.
            conditions: Prompts and regions of the crops.
            crops: The crops; their seed and keys decide the batches.
            draw_config: Random choices for every sample.
            noise_levels: Number of noise levels.
        """
        self._latents, self._text, self._conditions = latents, text, conditions
        self._crops, self._draw_config, self._noise_levels = crops, draw_config, noise_levels

    @classmethod
    def prepare(
        cls,
        base: DiffusionBase,
        crops: CroppedImages,
        conditions: CropConditions,
        draw_config: DrawConfig,
        cache: TensorCache,
    ) -> "DenoisingData":
        """Encode crops and prompts, or read them from the cache.

        Training needs neither VAE nor text encoder afterwards.

        Raises:
            DatasetError: A file is broken, or the size of the crops does not fit the VAE.
        """
        latents = cached_latents(cache, base, crops, crops.crops, flips=draw_config.flip > 0)
        text = cached_text(cache, base, conditions.prompts)
        return cls(latents, text, conditions, crops, draw_config, len(base.alphas_cumprod))

    def __len__(self) -> int:
        return len(self._crops.crops)

    @property
    def seed(self) -> int:
        """The seed of the batches."""
        return self._crops.seed

    def batch(self, step: int, size: int, device: torch.device | str = "cpu") -> DenoisingBatch:
        """Return the samples of one step."""
        return self.collate(self.draw_samples(step, size), device)

    def microbatches(
        self, step: int, size: int, count: int, device: torch.device | str = "cpu"
    ) -> Iterator[DenoisingBatch]:
        """Yield the samples of one step in at most ``count`` parts of nearly equal size."""
        draws = self.draw_samples(step, size)
        length = -(-size // count)
        for start in range(0, size, length):
            yield self.collate(draws[start : start + length], device)

    def draw_samples(self, step: int, size: int) -> list[SampleDraw]:
        """Draw the samples of one step; each depends on its position in the stream only."""
        return [self._draw_sample(position) for position in range(step * size, (step + 1) * size)]

    def fixed_samples(self, count: int, max_crops: int) -> list[SampleDraw]:
        """Return the first crops at evenly spaced noise levels, with the same noise at every call.

        Args:
            count: Number of noise levels.
            max_crops: Largest number of crops.
        """
        steps = [int((index + 0.5) * self._noise_levels / count) for index in range(count)]
        return [
            SampleDraw(crop, flipped=False, captioned=True, timestep=t, keys=("levels", crop, t))
            for crop in range(min(max_crops, len(self)))
            for t in steps
        ]

    def collate(
        self, draws: Sequence[SampleDraw], device: torch.device | str = "cpu"
    ) -> DenoisingBatch:
        """Return the batch of some samples on a device."""
        shape = self._latents.shape[2:]
        noise = [
            torch.randn(shape, generator=torch_generator(self._crops.seed, *draw.keys))
            for draw in draws
        ]
        text = self._text.select([self._prompt_row(draw) for draw in draws])
        return DenoisingBatch(
            latents=torch.stack([self._latents[draw.crop, int(draw.flipped)] for draw in draws]).to(
                device
            ),
            text=TextEncoding(
                text.hidden.to(device), None if text.pooled is None else text.pooled.to(device)
            ),
            regions=self._regions(draws, device) if self._draw_config.regions else None,
            timesteps=torch.tensor([draw.timestep for draw in draws], device=device),
            noise=torch.stack(noise).to(device),
            size=self._crops.config.size,
        )

    def _draw_sample(self, position: int) -> SampleDraw:
        seed, keys = self._crops.seed, self._crops.keys
        generator = numpy_generator(seed, *keys, "draw", position)
        flipped, dropped = generator.random(2) < (
            self._draw_config.flip,
            self._draw_config.caption_dropout,
        )
        return SampleDraw(
            crop=shuffled_index(position, len(self), seed, *keys),
            flipped=bool(flipped),
            captioned=not dropped,
            timestep=int(generator.integers(self._noise_levels)),
            keys=(*keys, "noise", position),
        )

    def _prompt_row(self, draw: SampleDraw) -> int:
        return self._conditions.prompt_index(draw.crop) if draw.captioned else -1

    def _regions(self, draws: Sequence[SampleDraw], device: torch.device | str) -> Regions:
        labels = [self._conditions.regions(draw.crop, flipped=draw.flipped) for draw in draws]
        tokens = [
            self._conditions.token_classes(draw.crop, captioned=draw.captioned) for draw in draws
        ]
        return Regions(
            torch.from_numpy(np.stack(labels)).to(device),
            torch.from_numpy(np.stack(tokens)).to(device),
            self._conditions.downsampling,
        )


def _mask_name(crop: Crop) -> str:
    return str(crop.sample.mask)
