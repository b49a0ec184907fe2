"""Train a generator: LoRA pairs and fusion layers on a frozen UNet, or the whole UNet."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from loraseg.adapters import adapter_files, load_adapter
from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.fusion_file import FusionMode, FusionState
from loraseg.backbones.diffusion import DiffusionBase
from loraseg.errors import ConfigError
from loraseg.fuse.merged import merged
from loraseg.fuse.mix import Mix
from loraseg.synth.generator_adapter import GeneratorAdapter
from loraseg.synth.region_attention import RegionControl
from loraseg.tensor_types import Tensor
from loraseg.train.checkpoint import CheckpointSlot
from loraseg.train.denoising import DenoisingBatch, denoising_loss
from loraseg.train.denoising_data import DenoisingData, Draw
from loraseg.train.generator_recipes import GeneratorRecipe
from loraseg.train.generator_targets import fusion_owners, generator_targets
from loraseg.train.loop import LoopResult, Optimisation, Watcher
from loraseg.train.pairs import acting, fresh_pairs, frozen
from loraseg.train.segmentation import fixed_threads

__all__ = [
    "FullTuning",
    "Hooks",
    "TrainedGenerator",
    "base_loss",
    "finetune_full",
    "train_generator",
]

# What a score rests on: so many views at so many noise levels.
_SCORED_VIEWS, _LEVELS = 32, 4


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedGenerator:
    """Pairs and fusion layers on the CPU, and how training went.

    Attributes:
        pairs: By module name.
        alphas: As :meth:`~loraseg.synth.region_attention.RegionControl.alpha_state`; may be empty.
        loop: How training went; None in the course of it.
        losses: Mean loss at the end, by the names of :attr:`Hooks.score_on`.
    """

    pairs: dict[str, LoraPair]
    alphas: dict[str, Tensor]
    loop: LoopResult | None = None
    losses: dict[str, float] = dataclasses.field(default_factory=dict[str, float])

    def adapter(self, base: DiffusionBase, recipe: GeneratorRecipe) -> GeneratorAdapter:
        """Return what a :class:`~loraseg.synth.generator.Generator` draws with."""
        fusion = None
        if self.alphas:
            fusion = FusionState(self.alphas, cast(FusionMode, recipe.fusion.mode))
        files = adapter_files(self.pairs, base_digest=base.digest)
        return GeneratorAdapter.of(load_adapter(files), fusion=fusion)


@dataclasses.dataclass(frozen=True, slots=True)
class FullTuning:
    """The UNet's weights after full tuning, on the CPU, with those of fusion layers.

    ``losses`` as in :class:`TrainedGenerator`.
    """

    unet: dict[str, Tensor]
    alphas: dict[str, Tensor]
    loop: LoopResult
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What goes on beside a training.

    Attributes:
        slot: Checkpoints; None keeps none.
        watch: Called after each step with (steps done, loss).
        active: Adapters that act, frozen, all the while.
        show: Called every ``grid.every`` steps with (steps done, what would be kept now), while
            nothing of the training is in the UNet.
        score_on: Data to score on at the end, always at the same noise. (The last step's loss is
            no such figure: it depends on the draw, and a run resumed at its end has none.)
        stop: For full tuning. Called after each step with (steps done, the UNet's state before the
            first one, on the CPU) while the UNet holds what has been learnt; True ends it there.
    """

    slot: CheckpointSlot | None = None
    watch: Watcher | None = None
    active: Mix | None = None
    show: Callable[[int, TrainedGenerator], None] | None = None
    score_on: Mapping[str, DenoisingData] = dataclasses.field(
        default_factory=dict[str, DenoisingData]
    )
    stop: Callable[[int, Mapping[str, Tensor]], bool] | None = None


_NO_HOOKS = Hooks()


def train_generator(
    base: DiffusionBase, data: DenoisingData, recipe: GeneratorRecipe, hooks: Hooks = _NO_HOOKS
) -> TrainedGenerator:
    """Train an adapter; the base is frozen and afterwards as it was, bit by bit.

    On the CPU the same arguments give the same bytes, however often the run is killed and resumed.

    Args:
        base: Where its UNet is (CPU or GPU) is where training happens.
        data: Its seed decides the initial pairs as well.
        recipe: What to train and how.
        hooks: Checkpoints, progress, active adapters, pictures.

    Raises:
        ConfigError: The recipe does not fit the UNet.
        AdapterMismatchError: A named layer is unknown.
        StageError: The loss is not finite.
        StoreError: The checkpoints cannot be read.
    """
    unet = base.unet
    names = generator_targets(unet, recipe)
    alpha = float(recipe.rank) if recipe.alpha is None else recipe.alpha
    pairs = fresh_pairs(unet, names, rank=recipe.rank, alpha=alpha, seed=data.seed)
    control = _control(unet, recipe, fusion_owners(unet, recipe, names))

    @contextmanager
    def in_place() -> Generator[None, None, None]:
        with merged(unet, hooks.active), acting(unet, pairs):
            yield

    def now() -> TrainedGenerator:
        return TrainedGenerator(pairs.copy(), control.alpha_state() if control else {})

    with ExitStack() as stack:
        stack.enter_context(fixed_threads(recipe.threads))
        stack.enter_context(frozen(unet, training=False))
        stack.enter_context(_recomputing(unet, recipe))
        run = _Run(base, data, recipe, control, in_place)
        loop = run.train(pairs.parameters(), hooks, now)
        with run.optimisation.averaged():
            losses = {name: run.score(held) for name, held in hooks.score_on.items()}
            return dataclasses.replace(now(), loop=loop, losses=losses)


def finetune_full(
    base: DiffusionBase, data: DenoisingData, recipe: GeneratorRecipe, hooks: Hooks = _NO_HOOKS
) -> FullTuning:
    """Train every weight of the UNet, for comparison; afterwards the base is as it was.

    The recipe's targets and rank do not count; all cross attention gets fusion layers if the
    recipe has any. A copy of the weights waits on the CPU.

    Args:
        base: As in :func:`train_generator`, like the rest.
        data: Its seed decides the batches.
        recipe: How to train.
        hooks: ``active`` and ``show`` are for adapters only. With ``stop`` no checkpoints are kept.

    Raises:
        StageError: The loss is not finite.
        StoreError: The checkpoints cannot be read.
    """
    unet: Any = base.unet
    every = dataclasses.replace(recipe, targets="cross", top=None, share=None)
    control = _control(unet, every, fusion_owners(unet, every, generator_targets(unet, every)))
    before = {name: value.detach().cpu().clone() for name, value in unet.state_dict().items()}
    parameters: dict[str, nn.Parameter] = dict(unet.named_parameters())
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    slot = None if hooks.stop else hooks.slot
    hooks = dataclasses.replace(hooks, active=None, show=None, slot=slot)
    try:
        unet.requires_grad_(True)
        with fixed_threads(recipe.threads), _recomputing(unet, recipe):
            run = _Run(base, data, recipe, control, nullcontext)
            stop = partial(_stops, hooks, before)
            loop = run.train(parameters, hooks, lambda: TrainedGenerator({}, {}), stop)
            with run.optimisation.averaged():
                state = {k: v.detach().cpu().clone() for k, v in unet.state_dict().items()}
                alphas = control.alpha_state() if control else {}
                losses = {name: run.score(held) for name, held in hooks.score_on.items()}
                return FullTuning(state, alphas, loop, losses)
    finally:
        unet.load_state_dict(before)
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None


def base_loss(base: DiffusionBase, data: DenoisingData, recipe: GeneratorRecipe) -> float:
    """Return the loss of the bare base with plain attention, at the noise of ``score_on``."""
    batches = (
        dataclasses.replace(batch, regions=None)
        for batch in _fixed_batches(data, recipe, base.device)
    )
    with fixed_threads(recipe.threads):
        return _mean_loss(base, batches, None, recipe)


class _Run:
    """One training while it goes on."""

    optimisation: Optimisation

    def __init__(
        self,
        base: DiffusionBase,
        data: DenoisingData,
        recipe: GeneratorRecipe,
        control: RegionControl | None,
        in_place: Callable[[], Any],
    ) -> None:
        self._base, self._data, self._recipe = base, data, recipe
        self._control, self._in_place = control, in_place

    def train(
        self,
        parameters: Mapping[str, nn.Parameter],
        hooks: Hooks,
        now: Callable[[], TrainedGenerator],
        stop: Callable[[int], bool] = lambda done: False,
    ) -> LoopResult:
        recipe = self._recipe
        alphas = self._control.alphas() if self._control else {}
        groups = [
            {"params": list(parameters.values()), "weight_decay": recipe.weight_decay},
            {"params": list(alphas.values()), "weight_decay": 0.0},
        ]
        rated = [{**group, "lr": recipe.learning_rate} for group in groups if group["params"]]
        self.optimisation = Optimisation(
            {**parameters, **alphas}, rated, recipe.loop, slot=hooks.slot, watch=hooks.watch
        )
        first = self.optimisation.first
        if first:
            self._show(first, hooks, now)  # the kill may have come before the picture
        for step in range(first, recipe.loop.steps):
            # Entered anew for each step: pictures and checkpoints see the bare UNet in between.
            with self._acting(), closing(self._losses(step)) as losses:
                self.optimisation.advance(step, losses)
            self._show(step + 1, hooks, now)
            if stop(step + 1):
                break
        return self.optimisation.result()

    def _show(self, done: int, hooks: Hooks, now: Callable[[], TrainedGenerator]) -> None:
        every = self._recipe.grid.every
        if hooks.show and every and done % every == 0:
            with self.optimisation.averaged():
                kept = now()
            hooks.show(done, kept)

    def score(self, data: DenoisingData) -> float:
        batches = _fixed_batches(data, self._recipe, self._base.device)
        with self._acting():
            return _mean_loss(self._base, batches, self._control, self._recipe)

    @contextmanager
    def _acting(self) -> Generator[None, None, None]:
        with self._in_place(), self._control.installed() if self._control else nullcontext():
            yield

    def _losses(self, step: int) -> Generator[Tensor, None, None]:
        """Yield the parts of a step's loss; each is taken back before the next is asked for."""
        recipe, size = self._recipe, self._recipe.batch_size
        device = self._base.device
        for batch in self._data.parts(step, size, recipe.accumulate, device):
            # Around the backward pass too, for gradient checkpointing runs layers again there.
            with self._regions(batch):
                loss = denoising_loss(
                    self._base, batch, self._control, recipe.loss, recipe.loop.precision
                )
                yield loss if len(batch) == size else loss * (len(batch) / size)

    def _regions(self, batch: DenoisingBatch) -> Any:
        if self._control is None:
            return nullcontext()
        return self._control.regions(batch.regions, latent=batch.latent_size)


def _stops(hooks: Hooks, before: Mapping[str, Tensor], done: int) -> bool:
    return hooks.stop is not None and hooks.stop(done, before)


def _control(
    unet: nn.Module, recipe: GeneratorRecipe, owners: Sequence[str]
) -> RegionControl | None:
    if not recipe.draws.regions:
        return None
    mode = "token" if recipe.fusion.mode == "off" else recipe.fusion.mode
    return RegionControl(
        unet, alpha_modules=owners, mode=mode, initial_bias=recipe.fusion.initial_bias
    )


@contextmanager
def _recomputing(unet: Any, recipe: GeneratorRecipe) -> Generator[None, None, None]:
    if not recipe.recompute:
        yield
        return
    if unet.is_gradient_checkpointing:
        raise ConfigError("recompute: gradient checkpointing of the UNet is on already")
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()


def _fixed_batches(
    data: DenoisingData, recipe: GeneratorRecipe, device: torch.device
) -> Generator[DenoisingBatch, None, None]:
    draws: list[Draw] = data.levels(_LEVELS, _SCORED_VIEWS)
    for start in range(0, len(draws), recipe.batch_size):
        yield data.of(draws[start : start + recipe.batch_size], device)


@torch.no_grad()
def _mean_loss(
    base: DiffusionBase,
    batches: Any,
    control: RegionControl | None,
    recipe: GeneratorRecipe,
) -> float:
    total, count = 0.0, 0
    for batch in batches:
        loss = denoising_loss(base, batch, control, recipe.loss, recipe.loop.precision)
        total, count = total + float(loss) * len(batch), count + len(batch)
    return total / count
