"""Training recipes of generator adapters: the config, and the published settings."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from loraseg.adapters.init import check_initialiser
from loraseg.config import OMITTED_AT_DEFAULT
from loraseg.errors import ConfigError
from loraseg.synth.conditioning import ConditioningConfig
from loraseg.train.core.loop import AveragingLoopConfig
from loraseg.train.core.recipes import recipe_with_overrides
from loraseg.train.generator_adapters.crops import ViewConfig
from loraseg.train.generator_adapters.denoising import LossConfig
from loraseg.train.generator_adapters.samples import DrawConfig

__all__ = [
    "GENERATOR_RECIPES",
    "AttentionMixConfig",
    "GeneratorRecipe",
    "SampleGridConfig",
    "matchmask",
    "matchmask_miniature",
    "named_generator_recipe",
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMixConfig:
    """Layers that mix plain and rectified cross-attention (MatchMask's layer-adaptive fusion).

    Attributes:
        mode: One share per query ("token"), one per sample ("pooled"), or "off": rectified
            attention only.
        initial_bias: The initial share is its sigmoid; -2 gives 0.12.
    """

    mode: Literal["token", "pooled", "off"] = "token"
    initial_bias: float = -2.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleGridConfig:
    """Images generated during training, for the report. They do not change the result.

    Attributes:
        every: Steps between two grids; 0 makes none.
        masks: Number of masks, the first of the validation split or, without one, of the training
            split.
        steps: DDIM sampling steps per image.
        guidance: Scale of classifier-free guidance.
    """

    every: int = 0
    masks: int = 4
    steps: int = 10
    guidance: float = 2.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.every < 0 or self.masks < 1 or self.steps < 1:
            raise ConfigError(
                f"grid: every {self.every}, masks {self.masks}, steps {self.steps}: expected at "
                "least 0, 1 and 1"
            )
        if not 1 <= self.guidance < float("inf"):
            raise ConfigError(f"grid.guidance: got {self.guidance}, expected at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorRecipe:
    """Settings that decide an adapter, beside base, data and seed.

    Attributes:
        name: Name of the recipe that this is or was derived from; for information only.
        targets: The adapted layers: a rule of
            :data:`loraseg.adapters.targets.unet.SELECTION_RULES`, a layer report (a path or URI),
            or a list of full names.
        top: Number of projections taken from the top of the layer report.
        share: Share of all projections taken from the top of the layer report, in (0, 1].
        init: Initial pairs, a key of :data:`loraseg.adapters.init.INITIALISERS`.
        rank: r of every pair.
        alpha: The scale of the update is alpha / rank; None is the rank, scale 1.
        learning_rate: Peak rate of all parameters.
        weight_decay: Weight decay of AdamW on the pairs. Attention-mix layers have none, since it
            would pull their shares towards one half.
        batch_size: Images per step.
        accumulate: Number of microbatches per step, to save memory; the gradient is that of the
            whole batch up to rounding.
        view: Size of the images.
        draws: Flips, dropped captions and the use of regions.
        fusion: Attention-mix layers of the cross-attention modules that have an adapted projection.
        loss: Weights of the noise levels.
        conditioning: Prompts from class names.
        recompute: Use gradient checkpointing, which takes less memory and a third more time.
        grid: Images generated during training.
        loop: Steps, schedule, average, clipping and precision.
        threads: CPU threads while training; another number changes the last bits of the result.
    """

    name: str
    targets: str | tuple[str, ...] = "matchmask"
    top: int | None = None
    share: float | None = None
    init: str = dataclasses.field(default="lora", metadata=OMITTED_AT_DEFAULT)
    rank: int = 16
    alpha: float | None = None
    learning_rate: float = 4e-5
    weight_decay: float = 1e-2
    batch_size: int = 4
    accumulate: int = 1
    view: ViewConfig = dataclasses.field(default_factory=ViewConfig)
    draws: DrawConfig = dataclasses.field(default_factory=DrawConfig)
    fusion: AttentionMixConfig = dataclasses.field(default_factory=AttentionMixConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    recompute: bool = False
    grid: SampleGridConfig = dataclasses.field(default_factory=SampleGridConfig)
    loop: AveragingLoopConfig
    threads: int = 1

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        check_initialiser(self.init)
        for field in ("rank", "batch_size", "accumulate", "threads"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}: got {getattr(self, field)}, expected at least 1")
        if self.accumulate > self.batch_size:
            raise ConfigError(
                f"accumulate: got {self.accumulate}, expected at most batch_size {self.batch_size}"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate: got {self.learning_rate}, expected above 0")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ConfigError(f"alpha: got {self.alpha}, expected above 0, or null for the rank")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"weight_decay: got {self.weight_decay}, expected at least 0")
        if not self.targets:
            raise ConfigError("targets: got none, expected a rule, a layer report or layer names")


def matchmask() -> GeneratorRecipe:
    """Return MatchMask's training on SD 1.4, as far as the paper states it.

    The paper states 0.7 M trained values and no rank; rank 16 gives 706,560 values in pairs and
    4,810 in attention-mix layers. The rate is the stated one, not multiplied by the batch size.
    """
    return GeneratorRecipe(
        name="matchmask",
        loop=AveragingLoopConfig(
            steps=100_000, clip_norm=1.0, schedule="constant", checkpoint_every=500
        ),
    )


def matchmask_miniature() -> GeneratorRecipe:
    """Return the recipe of the miniature generator, which takes minutes on one CPU core."""
    return GeneratorRecipe(
        name="matchmask-miniature",
        targets="cross",
        learning_rate=2e-3,
        batch_size=16,
        view=ViewConfig(size=(64, 64)),
        loop=AveragingLoopConfig(
            steps=400, warmup_steps=20, clip_norm=1.0, schedule="cosine", checkpoint_every=50
        ),
    )


GENERATOR_RECIPES: Mapping[str, Callable[[], GeneratorRecipe]] = {
    "matchmask": matchmask,
    "matchmask-miniature": matchmask_miniature,
}


def named_generator_recipe(name: str, *overrides: Mapping[str, Any]) -> GeneratorRecipe:
    """Return a recipe by name with some fields changed.

    Args:
        name: A key of :data:`GENERATOR_RECIPES`.
        overrides: Plain values by field, nested fields as nested mappings; a later one wins.

    Raises:
        ConfigError: There is no such recipe or field, or a value is out of range.
    """
    return recipe_with_overrides(
        {key: make() for key, make in GENERATOR_RECIPES.items()}, name, overrides
    )
