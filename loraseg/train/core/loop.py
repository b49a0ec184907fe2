"""The training loop: AdamW, schedule, clipping, averaging, checkpoints; nothing task-specific.

What happens at step s depends on the parameters, the optimiser's state and s alone, so a run that
is killed and resumed any number of times ends in the same bytes as one that is left alone.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from loraseg.errors import ConfigError, StageError
from loraseg.tensor_types import Tensor
from loraseg.train.core.checkpoint import CheckpointStore, TrainingSnapshot

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
# Whole, or in parts that are summed; each part's graph is gone before the next is asked for.
Loss = Tensor | Iterable[Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long and how to optimise.

    Attributes:
        steps: Number of updates.
        warmup_steps: Steps over which the rate rises linearly to the cosine.
        warmup_factor: Share of the rate at step 0, in (0, 1].
        clip_norm: Largest L2 norm of all gradients together.
        precision: "bf16" runs the forward pass under autocast; parameters stay float32.
        checkpoint_every: Steps between checkpoints; the last step has one too, for what comes
            after the loop may be killed as well. Changes nothing about the result.
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
    """A loop that may also keep its rate, and average what it passes through.

    A class of its own since the fields of :class:`LoopConfig` are part of the digests by which
    adapters that were published long ago are known to be done.

    Attributes:
        schedule: "cosine", or "constant" after the warm-up.
        ema_decay: Share of the average that a step keeps, in (0, 1); at step t at most
            (1 + t) / (10 + t), so that the start is soon forgotten. None averages nothing.
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
    """How a loop went: the last loss, batches without a label, and where it took up again."""

    loss: float
    skipped_batches: int
    resumed_from_step: int


def lr_factor(config: LoopConfig, step: int) -> float:
    """Return the share of the peak rate at a step in [0, steps).

    A cosine from 1 to 0 over all steps, or 1 all along; before ``warmup_steps`` a straight line
    from ``warmup_factor`` up to that (methods B.2).
    """
    constant = isinstance(config, AveragingLoopConfig) and config.schedule == "constant"
    if step >= config.warmup_steps:
        return 1.0 if constant else _cosine(config, step)
    share = step / config.warmup_steps
    top = 1.0 if constant else _cosine(config, config.warmup_steps)
    return config.warmup_factor * (1 - share) + top * share


class TrainingLoop:
    """One run of the loop, driven step by step, so that several runs can go side by side."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Iterable[Mapping[str, Any]],
        config: LoopConfig,
        *,
        checkpoints: CheckpointStore | None = None,
        on_step: StepCallback | None = None,
    ) -> None:
        """Take up where the slot's checkpoint left off, else begin.

        Args:
            parameters: All that trains, by a name that is stable between runs; changed in place.
            groups: AdamW groups over them with their peak ``lr`` and ``weight_decay``.
            config: Steps and schedule.
            checkpoints: Where checkpoints are kept; a usable one is resumed from. None keeps none.
            on_step: Called after each step with (steps done, loss); the loss is nan after a skip.

        Raises:
            StageError: The checkpoint holds other parameters.
            StoreError: The checkpoints cannot be read.
        """
        self.config = config
        self._parameters, self._checkpoints, self._on_step = parameters, checkpoints, on_step
        self._optimizer = torch.optim.AdamW([dict(group) for group in groups])
        self._peaks = [group["lr"] for group in self._optimizer.param_groups]
        self._average = _ExponentialAverage.create(config, parameters)
        snapshot = checkpoints.load() if checkpoints else None
        if snapshot:
            _restore(snapshot, parameters, self._optimizer, self._average)
        self.first_step, self._skipped = (
            (snapshot.step, snapshot.skipped_batches) if snapshot else (0, 0)
        )
        self._steps_done = self.first_step
        self._loss, self._started = math.nan, time.monotonic()

    def has_step(self, step: int) -> bool:
        """Whether this run has still to make a step."""
        return self.first_step <= step < self.config.steps

    def step(self, step: int, loss: Loss | None) -> None:
        """Make one step; steps come in order, from ``first_step`` on, none left out.

        Args:
            step: Number of the step.
            loss: Its loss, a pure function of the step and the parameters. None says that the
                step's batch has nothing to learn from. Parts are taken back one after the other:
                their sum is the loss, and the memory is that of one part.

        Raises:
            StageError: The loss or a gradient is not finite.
        """
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * lr_factor(self.config, step)
        if loss is None:
            self._skipped += 1
            self._loss = math.nan
        else:
            self._loss = _update(loss, self._parameters, self._optimizer, self.config, step)
            if self._average:
                self._average.update(step)
        done = self._steps_done = step + 1
        if self._checkpoints and (
            done % self.config.checkpoint_every == 0 or done == self.config.steps
        ):
            self._checkpoints.save(self._snapshot(done))
        if self._on_step:
            self._on_step(done, self._loss)

    @contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """Let the parameters be what is to be kept of the run: their average, if one is taken.

        At the end they are again what the next step goes on from.
        """
        if self._average is None:
            yield
            return
        with self._average.swapped_in():
            yield

    def _snapshot(self, step: int) -> TrainingSnapshot:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"value/{name}"] = parameter.detach().cpu()
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach().cpu()
            if self._average:
                tensors[f"average/{name}"] = self._average.values[name].cpu()
        return TrainingSnapshot(step, self._skipped, tensors)

    def result(self) -> LoopResult:
        """Return how it went, after the last step that is made.

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
        parameters: As in :class:`Optimisation`, like the rest.
        groups: AdamW groups over them.
        loss_fn: The loss of a step, as :meth:`Optimisation.advance` takes it.
        config: Steps and schedule.
        checkpoints: Where checkpoints are kept.
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


def _update(
    loss: Loss,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: LoopConfig,
    step: int,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    value = 0.0
    for part in (loss,) if isinstance(loss, Tensor) else loss:
        value += float(part.detach())
        if not math.isfinite(value):
            raise StageError(
                f"step {step}: the loss is {value}; expected a finite number (lower the learning "
                f"rate, or look for broken images)"
            )
        part.backward()
    norm = float(nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm))
    if not math.isfinite(norm):
        raise StageError(f"step {step}: the gradient norm is {norm}; expected a finite number")
    optimizer.step()
    return value


class _ExponentialAverage:
    """The running average of parameters, on their devices."""

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
    optimizer: torch.optim.Optimizer,
    average: _ExponentialAverage | None,
) -> None:
    for kind, wanted in (("value", parameters), ("average", average.values if average else {})):
        held = {key for key in snapshot.tensors if key.startswith(f"{kind}/")}
        if held != {f"{kind}/{name}" for name in wanted}:
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
                where = "cpu" if kind == "step" else parameter.device
                optimizer.state[parameter][kind] = tensor.to(where)
