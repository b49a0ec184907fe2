"""Train a generator: LoRA pairs and fusion layers on a frozen UNet, or the whole UNet."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from loraseg.adapters import load_adapter, to_peft_files
from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.attention_mix import AttentionMix, AttentionMixMode
from loraseg.backbones.diffusion import DiffusionBase
from loraseg.errors import ConfigError
from loraseg.fuse.merged import merged
from loraseg.fuse.mix import Mix
from loraseg.synth.generator_adapter import GeneratorAdapter
from loraseg.synth.region_attention import RegionControl
from loraseg.tensor_types import Tensor
from loraseg.train.core.checkpoint import CheckpointStore
from loraseg.train.core.loop import LoopResult, StepCallback, TrainingLoop
from loraseg.train.core.lora import apply_lora, freeze, init_lora
from loraseg.train.generator_adapters.denoising import DenoisingBatch, denoising_loss
from loraseg.train.generator_adapters.recipes import GeneratorRecipe
from loraseg.train.generator_adapters.samples import DenoisingData, SampleDraw
from loraseg.train.generator_adapters.targets import attention_mix_modules, generator_targets
from loraseg.train.segmenter_adapters.samples import fixed_threads

__all__ = [
    "Callbacks",
    "FinetunedUNet",
    "TrainedGenerator",
    "base_model_loss",
    "finetune_unet",
    "train_generator",
]

# What a score rests on: so many views at so many noise levels.
_SCORED_CROPS, _SCORED_NOISE_LEVELS = 32, 4


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
            fusion = AttentionMix(self.alphas, cast(AttentionMixMode, recipe.fusion.mode))
        files = to_peft_files(self.pairs, base_digest=base.digest)
        return GeneratorAdapter.from_adapter(load_adapter(files), attention_mix=fusion)


@dataclasses.dataclass(frozen=True, slots=True)
class FinetunedUNet:
    """The UNet's weights after full tuning, on the CPU, with those of fusion layers.

    ``losses`` as in :class:`TrainedGenerator`.
    """

    unet: dict[str, Tensor]
    alphas: dict[str, Tensor]
    loop: LoopResult
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """What goes on beside a training.

    Attributes:
        checkpoints: Checkpoints; None keeps none.
        on_step: Called after each step with (steps done, loss).
        frozen_adapters: Adapters that act, frozen, all the while.
        on_sample_grid: Called every ``grid.every`` steps with (steps done, what would be kept
            now), while nothing of the training is in the UNet.
        score_data: Data to score on at the end, always at the same noise. (The last step's loss is
            no such figure: it depends on the draw, and a run resumed at its end has none.)
        should_stop: For full tuning. Called after each step with (steps done, the UNet's state
            before the
            first one, on the CPU) while the UNet holds what has been learnt; True ends it there.
    """

    checkpoints: CheckpointStore | None = None
    on_step: StepCallback | None = None
    frozen_adapters: Mix | None = None
    on_sample_grid: Callable[[int, TrainedGenerator], None] | None = None
    score_data: Mapping[str, DenoisingData] = dataclasses.field(
        default_factory=dict[str, DenoisingData]
    )
    should_stop: Callable[[int, Mapping[str, Tensor]], bool] | None = None


_NO_CALLBACKS = Callbacks()


def train_generator(
    base: DiffusionBase,
    data: DenoisingData,
    recipe: GeneratorRecipe,
    callbacks: Callbacks = _NO_CALLBACKS,
) -> TrainedGenerator:
    """Train an adapter; the base is frozen and afterwards as it was, bit by bit.

    On the CPU the same arguments give the same bytes, however often the run is killed and resumed.

    Args:
        base: Where its UNet is (CPU or GPU) is where training happens.
        data: Its seed decides the initial pairs as well.
        recipe: What to train and how.
        callbacks: Checkpoints, progress, active adapters, pictures.

    Raises:
        ConfigError: The recipe does not fit the UNet.
        AdapterMismatchError: A named layer is unknown.
        StageError: The loss is not finite.
        StoreError: The checkpoints cannot be read.
    """
    unet = base.unet
    names = generator_targets(unet, recipe)
    alpha = float(recipe.rank) if recipe.alpha is None else recipe.alpha
    pairs = init_lora(unet, names, rank=recipe.rank, alpha=alpha, seed=data.seed)
    control = _region_control(unet, recipe, attention_mix_modules(unet, recipe, names))

    @contextmanager
    def in_place() -> Generator[None, None, None]:
        with merged(unet, callbacks.frozen_adapters), apply_lora(unet, pairs):
            yield

    def now() -> TrainedGenerator:
        return TrainedGenerator(pairs.detached(), control.alpha_state() if control else {})

    with ExitStack() as stack:
        stack.enter_context(fixed_threads(recipe.threads))
        stack.enter_context(freeze(unet, training=False))
        stack.enter_context(_gradient_checkpointing(unet, recipe))
        run = _GeneratorTrainer(base, data, recipe, control, in_place)
        loop = run.train(pairs.parameters(), callbacks, now)
        with run.loop.averaged():
            losses = {name: run.score(held) for name, held in callbacks.score_data.items()}
            return dataclasses.replace(now(), loop=loop, losses=losses)


def finetune_unet(
    base: DiffusionBase,
    data: DenoisingData,
    recipe: GeneratorRecipe,
    callbacks: Callbacks = _NO_CALLBACKS,
) -> FinetunedUNet:
    """Train every weight of the UNet, for comparison; afterwards the base is as it was.

    The recipe's targets and rank do not count; all cross attention gets fusion layers if the
    recipe has any. A copy of the weights waits on the CPU.

    Args:
        base: As in :func:`train_generator`, like the rest.
        data: Its seed decides the batches.
        recipe: How to train.
        callbacks: ``frozen_adapters`` and ``on_sample_grid`` are for adapters only. With
            ``should_stop`` no checkpoints are kept.

    Raises:
        StageError: The loss is not finite.
        StoreError: The checkpoints cannot be read.
    """
    unet: Any = base.unet
    every = dataclasses.replace(recipe, targets="cross", top=None, share=None)
    control = _region_control(
        unet, every, attention_mix_modules(unet, every, generator_targets(unet, every))
    )
    before = {name: value.detach().cpu().clone() for name, value in unet.state_dict().items()}
    parameters: dict[str, nn.Parameter] = dict(unet.named_parameters())
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    slot = None if callbacks.should_stop else callbacks.checkpoints
    callbacks = dataclasses.replace(
        callbacks, frozen_adapters=None, on_sample_grid=None, checkpoints=slot
    )
    try:
        unet.requires_grad_(True)
        with fixed_threads(recipe.threads), _gradient_checkpointing(unet, recipe):
            run = _GeneratorTrainer(base, data, recipe, control, nullcontext)
            stop = partial(_should_stop, callbacks, before)
            loop = run.train(parameters, callbacks, lambda: TrainedGenerator({}, {}), stop)
            with run.loop.averaged():
                state = {k: v.detach().cpu().clone() for k, v in unet.state_dict().items()}
                alphas = control.alpha_state() if control else {}
                losses = {name: run.score(held) for name, held in callbacks.score_data.items()}
                return FinetunedUNet(state, alphas, loop, losses)
    finally:
        unet.load_state_dict(before)
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None


def base_model_loss(base: DiffusionBase, data: DenoisingData, recipe: GeneratorRecipe) -> float:
    """Return the loss of the bare base with plain attention, at the noise of ``score_data``."""
    batches = (
        dataclasses.replace(batch, regions=None)
        for batch in _scoring_batches(data, recipe, base.device)
    )
    with fixed_threads(recipe.threads):
        return _mean_loss(base, batches, None, recipe)


class _GeneratorTrainer:
    """One training while it goes on."""

    loop: TrainingLoop

    def __init__(
        self,
        base: DiffusionBase,
        data: DenoisingData,
        recipe: GeneratorRecipe,
        control: RegionControl | None,
        apply_adapters: Callable[[], Any],
    ) -> None:
        self._base, self._data, self._recipe = base, data, recipe
        self._control, self._apply_adapters = control, apply_adapters

    def train(
        self,
        parameters: Mapping[str, nn.Parameter],
        callbacks: Callbacks,
        snapshot: Callable[[], TrainedGenerator],
        stop: Callable[[int], bool] = lambda done: False,
    ) -> LoopResult:
        recipe = self._recipe
        alphas = self._control.alphas() if self._control else {}
        groups = [
            {"params": list(parameters.values()), "weight_decay": recipe.weight_decay},
            {"params": list(alphas.values()), "weight_decay": 0.0},
        ]
        rated = [{**group, "lr": recipe.learning_rate} for group in groups if group["params"]]
        self.loop = TrainingLoop(
            {**parameters, **alphas},
            rated,
            recipe.loop,
            checkpoints=callbacks.checkpoints,
            on_step=callbacks.on_step,
        )
        first = self.loop.first_step
        if first:
            self._emit_sample_grid(
                first, callbacks, snapshot
            )  # the kill may have come before the picture
        for step in range(first, recipe.loop.steps):
            # Entered anew for each step: pictures and checkpoints see the bare UNet in between.
            with self._adapted(), closing(self._losses(step)) as losses:
                self.loop.step(step, losses)
            self._emit_sample_grid(step + 1, callbacks, snapshot)
            if stop(step + 1):
                break
        return self.loop.result()

    def _emit_sample_grid(
        self, done: int, hooks: Callbacks, now: Callable[[], TrainedGenerator]
    ) -> None:
        every = self._recipe.grid.every
        if hooks.on_sample_grid and every and done % every == 0:
            with self.loop.averaged():
                kept = now()
            hooks.on_sample_grid(done, kept)

    def score(self, data: DenoisingData) -> float:
        batches = _scoring_batches(data, self._recipe, self._base.device)
        with self._adapted():
            return _mean_loss(self._base, batches, self._control, self._recipe)

    @contextmanager
    def _adapted(self) -> Generator[None, None, None]:
        with self._apply_adapters(), self._control.installed() if self._control else nullcontext():
            yield

    def _losses(self, step: int) -> Generator[Tensor, None, None]:
        """Yield the parts of a step's loss; each is taken back before the next is asked for."""
        recipe, size = self._recipe, self._recipe.batch_size
        device = self._base.device
        for batch in self._data.microbatches(step, size, recipe.accumulate, device):
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


def _should_stop(hooks: Callbacks, before: Mapping[str, Tensor], done: int) -> bool:
    return hooks.should_stop is not None and hooks.should_stop(done, before)


def _region_control(
    unet: nn.Module, recipe: GeneratorRecipe, owners: Sequence[str]
) -> RegionControl | None:
    if not recipe.draws.regions:
        return None
    mode = "token" if recipe.fusion.mode == "off" else recipe.fusion.mode
    return RegionControl(
        unet, alpha_modules=owners, mode=mode, initial_bias=recipe.fusion.initial_bias
    )


@contextmanager
def _gradient_checkpointing(unet: Any, recipe: GeneratorRecipe) -> Generator[None, None, None]:
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


def _scoring_batches(
    data: DenoisingData, recipe: GeneratorRecipe, device: torch.device
) -> Generator[DenoisingBatch, None, None]:
    draws: list[SampleDraw] = data.fixed_samples(_SCORED_NOISE_LEVELS, _SCORED_CROPS)
    for start in range(0, len(draws), recipe.batch_size):
        yield data.collate(draws[start : start + recipe.batch_size], device)


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
