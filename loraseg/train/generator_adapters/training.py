"""Train a generator: LoRA pairs and attention-mix layers on a frozen UNet, or the whole UNet."""

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
from loraseg.train.core.lora import apply_lora, freeze, init_pairs
from loraseg.train.core.threads import fixed_threads
from loraseg.train.generator_adapters.denoising import DenoisingBatch, denoising_loss
from loraseg.train.generator_adapters.recipes import GeneratorRecipe
from loraseg.train.generator_adapters.samples import DenoisingData, SampleDraw
from loraseg.train.generator_adapters.targets import attention_mix_modules, generator_targets

__all__ = [
    "Callbacks",
    "FinetunedUNet",
    "TrainedGenerator",
    "base_model_loss",
    "finetune_unet",
    "train_generator",
]

# A loss is scored on this many crops, each at this many noise levels.
_SCORED_CROPS, _SCORED_NOISE_LEVELS = 32, 4


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedGenerator:
    """Trained pairs and attention-mix layers on the CPU.

    Attributes:
        pairs: Pairs by module name.
        alphas: Weights of the attention-mix layers, see
            :meth:`~loraseg.synth.region_attention.RegionControl.alpha_state`; may be empty.
        loop: Result of the training loop; None while training.
        losses: Mean loss after training, by the names of :attr:`Callbacks.score_data`.
    """

    pairs: dict[str, LoraPair]
    alphas: dict[str, Tensor]
    loop: LoopResult | None = None
    losses: dict[str, float] = dataclasses.field(default_factory=dict[str, float])

    def adapter(self, base: DiffusionBase, recipe: GeneratorRecipe) -> GeneratorAdapter:
        """Return the adapter that :class:`~loraseg.synth.generator.Generator` takes."""
        attention_mix = None
        if self.alphas:
            attention_mix = AttentionMix(self.alphas, cast(AttentionMixMode, recipe.fusion.mode))
        files = to_peft_files(self.pairs, base_digest=base.digest)
        return GeneratorAdapter.from_adapter(load_adapter(files), attention_mix=attention_mix)


@dataclasses.dataclass(frozen=True, slots=True)
class FinetunedUNet:
    """Weights of UNet and attention-mix layers after full fine-tuning, on the CPU.

    ``losses`` is as in :class:`TrainedGenerator`.
    """

    unet: dict[str, Tensor]
    alphas: dict[str, Tensor]
    loop: LoopResult
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """Checkpoints, callbacks and frozen adapters of a training run.

    Attributes:
        checkpoints: Store of the checkpoints; None keeps none.
        on_step: Called after each step with (finished steps, loss).
        frozen_adapters: Adapters merged into the UNet during training, frozen.
        on_sample_grid: Called every ``grid.every`` steps with (finished steps, the adapter as it
            would be kept now) while the UNet is the bare base.
        score_data: Data to score after training, by name, always with the same noise. The loss of
            the last step cannot replace it: it depends on the draw, and a run that resumes after
            its last step has none.
        should_stop: For full fine-tuning: called after each step with (finished steps, the UNet's
            initial state on the CPU) while the UNet holds the trained weights; True stops.
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
    """Train an adapter on a frozen base; the base's weights are unchanged afterwards, bit for bit.

    On the CPU equal arguments give equal bytes, however often the run is killed and resumed.

    Args:
        base: The generator; training runs on its UNet's device.
        data: Training data; its seed also decides the initial pairs.
        recipe: Targets, rank and optimisation.
        callbacks: Checkpoints, progress, frozen adapters, sample grids.

    Raises:
        ConfigError: The recipe does not fit the UNet.
        AdapterMismatchError: A named layer is unknown.
        StageError: The loss is not finite.
        StoreError: The checkpoints cannot be read.
    """
    unet = base.unet
    names = generator_targets(unet, recipe)
    alpha = float(recipe.rank) if recipe.alpha is None else recipe.alpha
    pairs = init_pairs(
        unet, names, rank=recipe.rank, alpha=alpha, seed=data.seed, method=recipe.init
    )
    control = _region_control(unet, recipe, attention_mix_modules(unet, recipe, names))

    @contextmanager
    def apply_adapters() -> Generator[None, None, None]:
        with merged(unet, callbacks.frozen_adapters), apply_lora(unet, pairs):
            yield

    def current() -> TrainedGenerator:
        return TrainedGenerator(pairs.detached(), control.alpha_state() if control else {})

    with ExitStack() as stack:
        stack.enter_context(fixed_threads(recipe.threads))
        stack.enter_context(freeze(unet, training=False))
        stack.enter_context(_gradient_checkpointing(unet, recipe))
        trainer = _GeneratorTrainer(base, data, recipe, control, apply_adapters)
        groups = pairs.optimiser_groups(recipe.learning_rate, recipe.weight_decay)
        loop = trainer.train(pairs.parameters(), groups, callbacks, current)
        with trainer.loop.averaged():
            losses = trainer.score_all(callbacks.score_data)
            return dataclasses.replace(current(), loop=loop, losses=losses)


def finetune_unet(
    base: DiffusionBase,
    data: DenoisingData,
    recipe: GeneratorRecipe,
    callbacks: Callbacks = _NO_CALLBACKS,
) -> FinetunedUNet:
    """Train every weight of the UNet, for comparison; the base's weights are restored afterwards.

    Targets and rank of the recipe are ignored; all cross attention gets attention-mix layers if
    the recipe has any. A copy of the initial weights is kept on the CPU.

    Args:
        base: The generator; training runs on its UNet's device.
        data: Training data.
        recipe: Optimisation.
        callbacks: ``frozen_adapters`` and ``on_sample_grid`` are ignored. With ``should_stop`` no
            checkpoints are kept.

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
    required = {name: parameter.requires_grad for name, parameter in parameters.items()}
    checkpoints = None if callbacks.should_stop else callbacks.checkpoints
    callbacks = dataclasses.replace(
        callbacks, frozen_adapters=None, on_sample_grid=None, checkpoints=checkpoints
    )
    group = {
        "params": list(parameters.values()),
        "lr": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
    }
    try:
        unet.requires_grad_(True)
        with fixed_threads(recipe.threads), _gradient_checkpointing(unet, recipe):
            trainer = _GeneratorTrainer(base, data, recipe, control, nullcontext)
            stop = partial(_should_stop, callbacks, before)
            loop = trainer.train(
                parameters, [group], callbacks, lambda: TrainedGenerator({}, {}), stop
            )
            with trainer.loop.averaged():
                state = {k: v.detach().cpu().clone() for k, v in unet.state_dict().items()}
                alphas = control.alpha_state() if control else {}
                losses = trainer.score_all(callbacks.score_data)
                return FinetunedUNet(state, alphas, loop, losses)
    finally:
        unet.load_state_dict(before)
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
            parameter.grad = None


def base_model_loss(base: DiffusionBase, data: DenoisingData, recipe: GeneratorRecipe) -> float:
    """Return the mean loss of the bare base with plain attention, with the noise of scoring."""
    batches = (
        dataclasses.replace(batch, regions=None)
        for batch in _scoring_batches(data, recipe, base.device)
    )
    with fixed_threads(recipe.threads):
        return _mean_loss(base, batches, None, recipe)


class _GeneratorTrainer:
    """A training run: its loop, and the UNet as it computes during a step."""

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
        groups: Sequence[Mapping[str, Any]],
        callbacks: Callbacks,
        snapshot: Callable[[], TrainedGenerator],
        stop: Callable[[int], bool] = lambda done: False,
    ) -> LoopResult:
        recipe = self._recipe
        alphas = self._control.alphas() if self._control else {}
        if alphas:
            # No weight decay: it would pull the mixing shares towards one half.
            mix = {"params": list(alphas.values()), "lr": recipe.learning_rate, "weight_decay": 0.0}
            groups = [*groups, mix]
        self.loop = TrainingLoop(
            {**parameters, **alphas},
            groups,
            recipe.loop,
            checkpoints=callbacks.checkpoints,
            on_step=callbacks.on_step,
        )
        first = self.loop.first_step
        if first:
            # The run may have been killed between the checkpoint and the sample grid.
            self._emit_sample_grid(first, callbacks, snapshot)
        for step in range(first, recipe.loop.steps):
            # Entered for each step: sample grids and checkpoints need the bare UNet in between.
            with self._adapted(), closing(self._losses(step)) as losses:
                self.loop.step(step, losses)
            self._emit_sample_grid(step + 1, callbacks, snapshot)
            if stop(step + 1):
                break
        return self.loop.result()

    def _emit_sample_grid(
        self, done: int, callbacks: Callbacks, snapshot: Callable[[], TrainedGenerator]
    ) -> None:
        every = self._recipe.grid.every
        if callbacks.on_sample_grid and every and done % every == 0:
            with self.loop.averaged():
                current = snapshot()
            callbacks.on_sample_grid(done, current)

    def score_all(self, data: Mapping[str, DenoisingData]) -> dict[str, float]:
        return {name: self.score(part) for name, part in data.items()}

    def score(self, data: DenoisingData) -> float:
        batches = _scoring_batches(data, self._recipe, self._base.device)
        with self._adapted():
            return _mean_loss(self._base, batches, self._control, self._recipe)

    @contextmanager
    def _adapted(self) -> Generator[None, None, None]:
        with self._apply_adapters(), self._control.installed() if self._control else nullcontext():
            yield

    def _losses(self, step: int) -> Generator[Tensor, None, None]:
        """Yield the loss of each microbatch; the loop runs its backward pass before the next."""
        recipe, size = self._recipe, self._recipe.batch_size
        device = self._base.device
        for batch in self._data.microbatches(step, size, recipe.accumulate, device):
            # Covers the backward pass, since gradient checkpointing runs layers again there.
            with self._regions(batch):
                loss = denoising_loss(
                    self._base, batch, self._control, recipe.loss, recipe.loop.precision
                )
                yield loss if len(batch) == size else loss * (len(batch) / size)

    def _regions(self, batch: DenoisingBatch) -> Any:
        if self._control is None:
            return nullcontext()
        return self._control.regions(batch.regions, latent=batch.latent_size)


def _should_stop(callbacks: Callbacks, before: Mapping[str, Tensor], done: int) -> bool:
    return callbacks.should_stop is not None and callbacks.should_stop(done, before)


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
