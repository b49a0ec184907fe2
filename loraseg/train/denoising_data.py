"""Batches for denoising: each a pure function of (seed, keys, step)."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from loraseg.backbones.diffusion import DiffusionBase, TextEncoding
from loraseg.errors import ConfigError
from loraseg.seeding import numpy_generator, torch_generator
from loraseg.synth.conditioning import Conditioner, Downsampling
from loraseg.synth.region_attention import Regions
from loraseg.tensor_types import Float, Tensor, UInt8, ndarray
from loraseg.train.denoising import DenoisingBatch
from loraseg.train.latents import TensorCache, cached_latents, cached_text
from loraseg.train.rounds import index_at
from loraseg.train.views import View, Views

__all__ = ["Conditions", "DenoisingData", "Draw", "DrawConfig"]

_KEPT_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DrawConfig:
    """What is drawn anew each time that a view comes up.

    Attributes:
        flip: Probability of a horizontal flip.
        caption_dropout: Probability that a sample has the empty prompt and no regions.
        regions: Whether places look at the words of their own class only (methods b.1).
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
class Draw:
    """One sample of a batch: which view, how, at which noise level, with which noise.

    ``keys`` are those of the noise's stream.
    """

    view: int
    flipped: bool
    captioned: bool
    timestep: int
    keys: tuple[str | int, ...]


class Conditions:
    """The prompts and regions of views. Regions stay in memory up to 2 GiB, else are made anew."""

    def __init__(self, views: Views, conditioner: Conditioner) -> None:
        """Look at every mask, so that one that cannot be used shows before long work starts.

        Raises:
            DatasetError: A file is broken, or a mask holds unknown ids or no labelled pixel.
        """
        self._views, self._conditioner = views, conditioner
        self.downsampling: Downsampling = conditioner.config.downsampling
        numbers: dict[str, int] = {}
        self._prompts: list[int] = []
        self._tokens: list[ndarray] = []
        self._kept: dict[int, ndarray] = {}
        kept_bytes = 0
        for index, view in enumerate(views.all):
            condition = conditioner(views.load(view)[1], where=_where(view))
            self._prompts.append(numbers.setdefault(condition.prompt, len(numbers)))
            self._tokens.append(condition.token_classes)
            if kept_bytes + condition.regions.nbytes <= _KEPT_BYTES:
                self._kept[index] = condition.regions
                kept_bytes += condition.regions.nbytes
        self.prompts = tuple(numbers)

    def prompt(self, view: int) -> int:
        """Return the place of a view's prompt in :attr:`prompts`."""
        return self._prompts[view]

    def tokens(self, view: int, *, captioned: bool) -> ndarray:
        """Return the class of each token of the prompt, or of the empty one."""
        tokens = self._tokens[view]
        return tokens if captioned else np.full_like(tokens, -1)

    def regions(self, view: int, *, flipped: bool) -> UInt8[ndarray, "h w"]:
        """Return the classes of a view's places."""
        found = self._kept.get(view)
        if found is None:
            which = self._views.all[view]
            found = self._conditioner(self._views.load(which)[1], where=_where(which)).regions
        return np.ascontiguousarray(found[:, ::-1]) if flipped else found


class DenoisingData:
    """Latents, encoded prompts and regions of views, in host memory, and the batches of steps."""

    def __init__(
        self,
        latents: Float[Tensor, "n f c y x"],
        text: TextEncoding,
        conditions: Conditions,
        views: Views,
        draws: DrawConfig,
        levels: int,
    ) -> None:
        """Take what :meth:`prepare` has made.

        Args:
            latents: Of each view as it is and, with f = 2, flipped.
            text: A row for each of the conditions' prompts and, last, one for no prompt.
            conditions: Of the same views.
            views: Their seed and keys decide the batches.
            draws: What is drawn for each sample.
            levels: Number of noise levels.
        """
        self._latents, self._text, self._conditions = latents, text, conditions
        self._views, self._draws, self._levels = views, draws, levels

    @classmethod
    def prepare(
        cls,
        base: DiffusionBase,
        views: Views,
        conditions: Conditions,
        draws: DrawConfig,
        cache: TensorCache,
    ) -> "DenoisingData":
        """Encode what the cache does not hold; afterwards neither VAE nor text encoder is needed.

        Raises:
            DatasetError: A file is broken, or the views' sides do not suit the VAE.
        """
        latents = cached_latents(cache, base, views, views.all, flips=draws.flip > 0)
        text = cached_text(cache, base, conditions.prompts)
        return cls(latents, text, conditions, views, draws, len(base.alphas_cumprod))

    def __len__(self) -> int:
        return len(self._views.all)

    @property
    def seed(self) -> int:
        """The seed that decides the batches."""
        return self._views.seed

    def batch(self, step: int, size: int, device: torch.device | str = "cpu") -> DenoisingBatch:
        """Return the samples of one step."""
        return self.of(self.draws(step, size), device)

    def parts(
        self, step: int, size: int, count: int, device: torch.device | str = "cpu"
    ) -> Iterator[DenoisingBatch]:
        """Yield the samples of one step in at most ``count`` parts of nearly equal size."""
        draws = self.draws(step, size)
        length = -(-size // count)
        for start in range(0, size, length):
            yield self.of(draws[start : start + length], device)

    def draws(self, step: int, size: int) -> list[Draw]:
        """Draw what the samples of one step are; each depends on its own position only."""
        return [self._drawn(position) for position in range(step * size, (step + 1) * size)]

    def levels(self, count: int, views: int) -> list[Draw]:
        """Return the first views at ``count`` evenly spread noise levels, the noise always equal.

        Args:
            count: Number of levels.
            views: Most views.
        """
        steps = [int((place + 0.5) * self._levels / count) for place in range(count)]
        return [
            Draw(view, flipped=False, captioned=True, timestep=t, keys=("levels", view, t))
            for view in range(min(views, len(self)))
            for t in steps
        ]

    def of(self, draws: Sequence[Draw], device: torch.device | str = "cpu") -> DenoisingBatch:
        """Put samples together, on a device."""
        shape = self._latents.shape[2:]
        noise = [
            torch.randn(shape, generator=torch_generator(self._views.seed, *draw.keys))
            for draw in draws
        ]
        text = self._text.rows([self._row(draw) for draw in draws])
        return DenoisingBatch(
            latents=torch.stack([self._latents[draw.view, int(draw.flipped)] for draw in draws]).to(
                device
            ),
            text=TextEncoding(
                text.hidden.to(device), None if text.pooled is None else text.pooled.to(device)
            ),
            regions=self._regions(draws, device) if self._draws.regions else None,
            timesteps=torch.tensor([draw.timestep for draw in draws], device=device),
            noise=torch.stack(noise).to(device),
            size=self._views.config.size,
        )

    def _drawn(self, position: int) -> Draw:
        seed, keys = self._views.seed, self._views.keys
        generator = numpy_generator(seed, *keys, "draw", position)
        flipped, dropped = generator.random(2) < (self._draws.flip, self._draws.caption_dropout)
        return Draw(
            view=index_at(position, len(self), seed, *keys),
            flipped=bool(flipped),
            captioned=not dropped,
            timestep=int(generator.integers(self._levels)),
            keys=(*keys, "noise", position),
        )

    def _row(self, draw: Draw) -> int:
        return self._conditions.prompt(draw.view) if draw.captioned else -1

    def _regions(self, draws: Sequence[Draw], device: torch.device | str) -> Regions:
        labels = [self._conditions.regions(draw.view, flipped=draw.flipped) for draw in draws]
        tokens = [self._conditions.tokens(draw.view, captioned=draw.captioned) for draw in draws]
        return Regions(
            torch.from_numpy(np.stack(labels)).to(device),
            torch.from_numpy(np.stack(tokens)).to(device),
            self._conditions.downsampling,
        )


def _where(view: View) -> str:
    return str(view.sample.mask)
