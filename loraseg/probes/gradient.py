"""The gradient probe of MatchMask: which layers full fine-tuning changes most.

MatchMask, section on the gradient probe: ``S_i = |theta_i - theta'_i| / |theta'_i|`` for layer i
with weights theta' before and theta after fine-tuning. The paper gives no stop rule and no
optimiser; both are settings here.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from loraseg import config as configuration
from loraseg.adapters.targets.layer_report import LayerReport, LayerScore
from loraseg.adapters.targets.selection import select_from_report
from loraseg.adapters.targets.unet import attention_projections
from loraseg.backbones.diffusion import DiffusionBase
from loraseg.errors import ConfigError
from loraseg.tensor_types import Tensor
from loraseg.train.core.loop import AveragingLoopConfig, StepCallback
from loraseg.train.generator_adapters.recipes import AttentionMixConfig, GeneratorRecipe
from loraseg.train.generator_adapters.samples import DenoisingData, DrawConfig
from loraseg.train.generator_adapters.training import Callbacks, finetune_unet

__all__ = ["GradientProbeConfig", "gradient_probe", "relative_changes"]

logger = logging.getLogger(__name__)

# Tensors with a smaller norm count as zero-initialised; their relative change is meaningless.
_SMALLEST_NORM = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GradientProbeConfig:
    """How the UNet is fine-tuned, and when its ranking of layers counts as stable.

    Attributes:
        epochs: Largest number of epochs.
        learning_rate: Constant learning rate of AdamW without weight decay. The default is for
            Stable Diffusion; the miniature needs 1e-4.
        batch_size: Images per step; an epoch has ceil(views / batch_size) steps.
        accumulate: Number of micro-batches per step, to save memory.
        top: Number of leading projections that are compared between epochs; None to use ``share``.
        share: Share of all projections that is compared between epochs, in (0, 1].
        stop_overlap: Training stops when the leading projections of two epochs have this Jaccard
            overlap, in (0, 1].
        clip_norm: Largest L2 norm of all gradients together.
        precision: "bf16" runs the UNet under autocast; its weights stay float32.
        recompute: Gradient checkpointing.
        threads: CPU threads of the training. The last bits of a result depend on it.
    """

    epochs: int = 5
    learning_rate: float = 1e-5
    batch_size: int = 4
    accumulate: int = 1
    top: int | None = None
    share: float = 0.3
    stop_overlap: float = 0.9
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        for field in ("share", "stop_overlap"):
            if not 0 < getattr(self, field) <= 1:
                raise ConfigError(f"{field}: got {getattr(self, field)}, expected in (0, 1]")
        if self.epochs < 1 or (self.top is not None and self.top < 1):
            raise ConfigError(f"epochs {self.epochs}, top {self.top}: expected at least 1")
        self.recipe(1)  # checks the other settings

    def recipe(self, views: int) -> GeneratorRecipe:
        """Return the recipe for fine-tuning on a number of views.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: got {self.batch_size}, expected at least 1")
        return GeneratorRecipe(
            name="gradient-probe",
            learning_rate=self.learning_rate,
            weight_decay=0.0,  # decay changes weights too and would inflate the scores
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            draws=DrawConfig(regions=True),
            fusion=AttentionMixConfig(mode="off"),
            recompute=self.recompute,
            loop=AveragingLoopConfig(
                steps=self.epochs * self.epoch_steps(views),
                clip_norm=self.clip_norm,
                schedule="constant",
                precision=self.precision,
            ),
            threads=self.threads,
        )

    def epoch_steps(self, views: int) -> int:
        """Return the number of steps per epoch."""
        return -(-views // self.batch_size)


_DEFAULT = GradientProbeConfig()


def gradient_probe(
    base: DiffusionBase,
    data: DenoisingData,
    config: GradientProbeConfig = _DEFAULT,
    *,
    on_step: StepCallback | None = None,
) -> LayerReport:
    """Fine-tune the whole UNet and score each layer by the relative change of its weight.

    The score is S = |W - W'| / |W'| with Frobenius norms, W' before and W after the last epoch. The
    history of a layer holds S at the end of each epoch. Layers with |W'| below 1e-8 have no score.

    W' is kept on the CPU and compared weight by weight, so the accelerator holds one additional
    weight at a time. The UNet's weights are restored exactly afterwards. On the CPU, equal
    arguments give equal bytes.

    Args:
        base: The generator; its UNet is trained in place, on its device. Must be float32.
        data: A few labelled images, with regions for rectified attention. Their seed determines
            the batches.
        config: Settings of the fine-tuning and the stop rule.
        on_step: Called after each step with (steps done, loss).

    Raises:
        ConfigError: The UNet is not float32, or ``top`` exceeds its number of projections.
        AdapterMismatchError: The UNet has no attention projections.
        StageError: The loss is not finite.
    """
    if base.dtype != torch.float32:
        # Updates as small as the learning rate vanish in the rounding of half precision.
        raise ConfigError(
            f"gradient probe: the UNet is {base.dtype}, expected torch.float32 (precision=bf16 "
            f"trains float32 weights under autocast)"
        )
    ranking = _LayerRanking(base, config, data)
    finetune_unet(
        base, data, config.recipe(len(data)), Callbacks(on_step=on_step, should_stop=ranking.update)
    )
    return ranking.report()


@torch.no_grad()
def relative_changes(module: nn.Module, before: Mapping[str, Tensor]) -> dict[str, float]:
    """Return |p - p'| / |p'| of each parameter p, MatchMask's layer score.

    Args:
        module: The module with parameters p, of any shapes.
        before: The values p' by parameter name, of the same shapes, on any device.

    Returns:
        Relative change by parameter name, without parameters whose |p'| is below 1e-8.
    """
    changes: dict[str, float] = {}
    for name, parameter in module.named_parameters():
        start = before[name].to(parameter.device)
        norm = _norm(start)
        if norm >= _SMALLEST_NORM:
            changes[name] = _norm(parameter - start) / norm
    return changes


class _LayerRanking:
    """Scores of the layers by epoch."""

    def __init__(
        self, base: DiffusionBase, config: GradientProbeConfig, data: DenoisingData
    ) -> None:
        self._base, self._config, self._data = base, config, data
        self._unet: nn.Module = base.unet
        self._projections = {layer.name: layer for layer in attention_projections(self._unet)}
        if config.top is not None and config.top > len(self._projections):
            raise ConfigError(
                f"gradient probe: top {config.top}, expected at most {len(self._projections)}, "
                f"the number of attention projections"
            )
        self._epoch_steps = config.epoch_steps(len(data))
        self._epochs: list[dict[str, float]] = []
        self._overlaps: list[float] = []
        self._previous_leading: frozenset[str] = frozenset()

    def update(self, done: int, before: Mapping[str, Tensor]) -> bool:
        """Score the layers at the end of an epoch; return whether their ranking is stable."""
        if done % self._epoch_steps:
            return False
        self._epochs.append(relative_changes(self._unet, before))
        report = self.report()
        top = self._config.top
        share = self._config.share if top is None else None
        leading = frozenset(select_from_report(report, top=top, share=share))
        if len(self._epochs) > 1:
            previous = self._previous_leading
            self._overlaps.append(len(leading & previous) / len(leading | previous))
            logger.info("epoch %d: overlap %.3f", len(self._epochs), self._overlaps[-1])
        self._previous_leading = leading
        return bool(self._overlaps) and self._overlaps[-1] >= self._config.stop_overlap

    def report(self) -> LayerReport:
        """Return the scores after the last epoch."""
        scored = [name for name in self._weight_sizes() if f"{name}.weight" in self._epochs[-1]]
        settings: dict[str, Any] = configuration.to_dict(self._config)
        return LayerReport(
            method="gradient",
            base_name=self._base.name,
            base_digest=self._base.digest,
            scores=tuple(self._layer_score(name) for name in scored),
            samples={
                "views": len(self._data),
                "epochs": len(self._epochs),
                "steps": len(self._epochs) * self._epoch_steps,
                "layers_left_out": len(self._weight_sizes()) - len(scored),
            },
            settings={**settings, "seed": self._data.seed, "overlaps": list(self._overlaps)},
        )

    def _weight_sizes(self) -> dict[str, int]:
        """Return the number of elements of each layer's weight."""
        return {
            name.removesuffix(".weight"): parameter.numel()
            for name, parameter in self._unet.named_parameters()
            if name.endswith(".weight")
        }

    def _layer_score(self, name: str) -> LayerScore:
        history = tuple(epoch[f"{name}.weight"] for epoch in self._epochs)
        if name in self._projections:
            return LayerScore.from_projection(self._projections[name], history[-1], history)
        numel = self._weight_sizes()[name]
        return LayerScore(name=name, score=history[-1], history=history, numel=numel)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
