"""The training loop of adapters and bases: AdamW, schedule, clipping, averaging, checkpoints.

Step s depends only on s, the parameters and the optimiser's state. A run that is killed and resumed
any number of times therefore ends in the same bytes as an uninterrupted one.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from loraseg.errors import ConfigError, StageError
from loraseg.tensor_types import Tensor
from loraseg.train.core.checkpoint import CheckpointStore, TrainingSnapshot
from loraseg.train.core.optimisation import OptimiserStep, is_due

__all__ = [
    "AveragingLoopConfig",
    "LoopConfig",
    "LoopResult",
    "Loss",
    "StepCallback",
    "TrainingLoop",
    "lr_factor",
    "run_loop",
]

logger = logging.getLogger(__name__)

StepCallback = Callable[[int, float], None]
# The loss, or parts that add up to it; each part's graph is freed before the next is computed.
Loss = Tensor | Iterable[Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Number of steps, schedule, clipping and precision.

    Attributes:
        steps: Number of updates.
        warmup_steps: Steps over which the rate rises linearly to the cosine.
        warmup_factor: Share of the rate at step 0, in (0, 1].
        clip_norm: Largest L2 norm of all gradients together.
        precision: "bf16" runs the forward pass under autocast; parameters stay float32.
        checkpoint_every: Steps between checkpoints. The last step writes one too, since the run
            can be killed after the loop as well. Does not change the result.
    """

    steps: int
    warmup_steps: int = 0
    warmup_factor: float = 0.01
    clip_norm: float = 0.01
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.steps < 1 or self.checkpoint_every < 1 or self.warmup_steps < 0:
            raise ConfigError(
                f"steps {self.steps}, checkpoint_every {self.checkpoint_every}, warmup_steps "
                f"{self.warmup_steps}: expected at least 1, 1 and 0"
            )
        if not 0 < self.warmup_factor <= 1:
            raise ConfigError(f"warmup_factor: got {self.warmup_factor}, expected in (0, 1]")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm: got {self.clip_norm}, expected above 0")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AveragingLoopConfig(LoopConfig):
    """A loop with a choice of schedule and an exponential moving average of the parameters.

    A separate class because the fields of :class:`LoopConfig` are part of the digests of adapters
    that are published already.

    Attributes:
        schedule: "cosine", or "constant" after the warm-up.
        ema_decay: Share of the average that a step keeps, in (0, 1), at most (1 + t) / (10 + t) at
            step t, so that the initial values decay fast. None keeps no average.
    """

    schedule: Literal["cosine", "constant"] = "cosine"
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        LoopConfig.__post_init__(self)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay: got {self.ema_decay}, expected in (0, 1) or null")


@dataclasses.dataclass(frozen=True, slots=True)
class LoopResult:
    """Result of a loop.

    Attributes:
        loss: Loss of the last step; nan if the step was skipped or made by an earlier run.
        skipped_batches: Number of batches without a labelled pixel.
        resumed_from_step: Step of the checkpoint that the run resumed from; 0 without one.
    """

    loss: float
    skipped_batches: int
    resumed_from_step: int


def lr_factor(config: LoopConfig, step: int) -> float:
    """Return the share of the peak rate at a step in [0, steps).

    A cosine from 1 to 0 over all steps, or a constant 1; before ``warmup_steps`` a straight line
    from ``warmup_factor`` to the value at ``warmup_steps``, as in detectron2's ``WarmupCosineLR``,
    which SemLA trains with.
    """
    constant = isinstance(config, AveragingLoopConfig) and config.schedule == "constant"
    if step >= config.warmup_steps:
        return 1.0 if constant else _cosine(config, step)
    share = step / config.warmup_steps
    top = 1.0 if constant else _cosine(config, config.warmup_steps)
    return config.warmup_factor * (1 - share) + top * share


class TrainingLoop:
    """A run that the caller drives step by step, so that several runs can be interleaved."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Iterable[Mapping[str, Any]],
        config: LoopConfig,
        *,
        checkpoints: CheckpointStore | None = None,
        on_step: StepCallback | None = None,
    ) -> None:
        """Resume from the newest checkpoint, or start at step 0 without one.

        Args:
            parameters: Trained parameters by a name that is stable between runs; changed in place.
            groups: AdamW groups of them with their peak ``lr`` and ``weight_decay``.
            config: Steps and schedule.
            checkpoints: Store of the checkpoints; None keeps none.
            on_step: Called after each step with (finished steps, loss); the loss of a skipped step
                is nan.

        Raises:
            StageError: The checkpoint holds other parameters.
            StoreError: The checkpoints cannot be read.
        """
        self.config = config
        self._parameters, self._checkpoints, self._on_step = parameters, checkpoints, on_step
        self._optimiser = torch.optim.AdamW([dict(group) for group in groups])
        self._optimiser_step = OptimiserStep(
            self._optimiser,
            parameters.values(),
            lambda peak, step: peak * lr_factor(config, step),
            clip_norm=config.clip_norm,
        )
        self._average = _ExponentialAverage.create(config, parameters)
        snapshot = checkpoints.load() if checkpoints else None
        if snapshot:
            _restore(snapshot, parameters, self._optimiser, self._average)
        self.first_step, self._skipped = (
            (snapshot.step, snapshot.skipped_batches) if snapshot else (0, 0)
        )
        self._steps_done = self.first_step
        self._loss, self._started = math.nan, time.monotonic()

    def has_step(self, step: int) -> bool:
        """Return whether this run still has to make a step."""
        return self.first_step <= step < self.config.steps

    def step(self, step: int, loss: Loss | None) -> None:
        """Make one step. Steps are made in order from ``first_step``, without gaps.

        Args:
            step: Number of the step.
            loss: Its loss, a pure function of the step and the parameters; None if the batch has no
                labelled pixel. Parts are differentiated one after the other: their sum is the loss,
                and only one part's graph is in memory.

        Raises:
            StageError: The loss or a gradient is not finite.
        """
        self._loss = math.nan if loss is None else 0.0
        if loss is None:
            self._skipped += 1
        else:
            parts = (loss,) if isinstance(loss, Tensor) else loss
            self._optimiser_step.update(
                step, self._checked(step, parts), partial(_check_norm, step)
            )
            if self._average:
                self._average.update(step)
        done = self._steps_done = step + 1
        if self._checkpoints and is_due(done, self.config.checkpoint_every, self.config.steps):
            self._checkpoints.save(self._snapshot(done))
        if self._on_step:
            self._on_step(done, self._loss)

    def _checked(self, step: int, parts: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Yield the parts of a loss, adding up their values and checking the sum."""
        for part in parts:
            self._loss += float(part.detach())
            if not math.isfinite(self._loss):
                raise StageError(
                    f"step {step}: the loss is {self._loss}; expected a finite number (lower the "
                    f"learning rate, or look for broken images)"
                )
            yield part

    @contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """Set the parameters to their average inside the block, if the config keeps one."""
        if self._average is None:
            yield
            return
        with self._average.swapped_in():
            yield

    def _snapshot(self, step: int) -> TrainingSnapshot:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"value/{name}"] = parameter.detach().cpu()
            for key, value in self._optimiser.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach().cpu()
            if self._average:
                tensors[f"average/{name}"] = self._average.values[name].cpu()
        return TrainingSnapshot(step, self._skipped, tensors)

    def result(self) -> LoopResult:
        """Return the result after the last step.

        Raises:
            StageError: Every batch was skipped.
        """
        if self._skipped == self.config.steps:
            raise StageError(
                f"all {self._skipped} batches held no labelled pixel; nothing was learnt"
            )
        steps, seconds = self._steps_done - self.first_step, time.monotonic() - self._started
        logger.info("%d steps, %.1f s", steps, seconds)
        return LoopResult(self._loss, self._skipped, self.first_step)


def run_loop(
    parameters: Mapping[str, nn.Parameter],
    groups: Iterable[Mapping[str, Any]],
    loss_fn: Callable[[int], Loss | None],
    config: LoopConfig,
    *,
    checkpoints: CheckpointStore | None = None,
    on_step: StepCallback | None = None,
) -> LoopResult:
    """Optimise ``parameters`` in place for ``config.steps`` steps.

    Args:
        parameters: As in :class:`TrainingLoop`, like the other arguments.
        groups: AdamW groups of them.
        loss_fn: Returns the loss of a step, as :meth:`TrainingLoop.step` takes it.
        config: Steps and schedule.
        checkpoints: Store of the checkpoints.
        on_step: Called after each step.

    Raises:
        StageError: The loss or a gradient is not finite, or every batch was skipped.
        StoreError: The checkpoints cannot be read.
    """
    run = TrainingLoop(parameters, groups, config, checkpoints=checkpoints, on_step=on_step)
    for step in range(run.first_step, config.steps):
        run.step(step, loss_fn(step))
    return run.result()


def _cosine(config: LoopConfig, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(step / config.steps, 1)))


def _check_norm(step: int, norm: Tensor) -> None:
    if not math.isfinite(float(norm)):
        raise StageError(
            f"step {step}: the gradient norm is {float(norm)}; expected a finite number"
        )


class _ExponentialAverage:
    """Exponential moving average of parameters, on their devices."""

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self._decay, self._parameters = decay, parameters
        self.values = {name: value.detach().clone() for name, value in parameters.items()}

    @classmethod
    def create(
        cls, config: LoopConfig, parameters: Mapping[str, nn.Parameter]
    ) -> "_ExponentialAverage | None":
        if isinstance(config, AveragingLoopConfig) and config.ema_decay is not None:
            return cls(config.ema_decay, parameters)
        return None

    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Generator[None, None, None]:
        current = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._assign(self.values)
        try:
            yield
        finally:
            self._assign(current)

    def _assign(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])


def _restore(
    snapshot: TrainingSnapshot,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    average: _ExponentialAverage | None,
) -> None:
    for kind, names in (("value", parameters), ("average", average.values if average else {})):
        stored = {key for key in snapshot.tensors if key.startswith(f"{kind}/")}
        if stored != {f"{kind}/{name}" for name in names}:
            raise StageError("the checkpoint holds other parameters than the model that resumes it")
    with torch.no_grad():
        for key, tensor in snapshot.tensors.items():
            kind, _, name = key.partition("/")
            parameter = parameters[name]
            if kind == "value":
                parameter.copy_(tensor)
            elif kind == "average" and average:
                average.values[name].copy_(tensor)
            else:
                # AdamW counts its steps on the CPU, wherever the parameters are.
                device = "cpu" if kind == "step" else parameter.device
                optimiser.state[parameter][kind] = tensor.to(device)
