"""Training recipes of closed-set segmenters: the config, and the standard settings."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loraseg.errors import ConfigError
from loraseg.segment.closed_set.networks import NetworkConfig
from loraseg.train.core.recipes import recipe_with_overrides

__all__ = ["SEGMENTER_RECIPES", "SegmenterRecipe", "lr_factor", "named_segmenter_recipe"]

_POLY_POWER = 0.9
_COSINE_FLOOR = 0.02
_VALUE_RULES: Mapping[str, Callable[[Any], bool]] = {
    "at least 1": lambda value: value >= 1,
    "above 0": lambda value: 0 < value < math.inf,
    "above 0 or null": lambda value: value is None or 0 < value < math.inf,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda values: all(0 <= value < 1 for value in values),
    "at least 0": lambda value: 0 <= value < math.inf,
    "a range above 0": lambda value: 0 < value[0] <= value[1] < math.inf,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterRecipe:
    """Settings that decide a segmenter, beside data and seed.

    Attributes:
        name: Name of the recipe that this is or was derived from; for information only.
        network: The network.
        weights: Pretrained weights, see
            :func:`loraseg.segment.closed_set.pretrained.load_pretrained`; None starts from random
            weights.
        steps: Number of updates.
        batch_size: Images per step, over all workers.
        synthetic_share: Share of synthetic images in a batch, if there is synthetic data, rounded
            to whole images; 1 uses no real images.
        crop: Side of the training crop in pixels.
        shortest_edge: Length of the shorter side at scale 1; None keeps that of the image.
        scales: Range of the uniformly drawn scale.
        flip: Probability of a horizontal flip.
        jitter: Whether to jitter colours as SSD does.
        optimiser: "sgd" (with momentum 0.9) or "adamw".
        betas: Betas of AdamW.
        learning_rate: Peak rate of the backbone.
        head_factor: Factor of the rate for all parameters outside the backbone.
        weight_decay: Weight decay; parameters that the network exempts have none.
        schedule: "poly" is (1 - s / S) ** 0.9, "cosine" ends at 2 %.
        warmup_steps: Steps over which the rate rises linearly.
        clip_norm: Largest L2 norm of all gradients together; None does not clip.
        rare_weight: Loss weight of classes that cover less than ``rare_share`` of the labelled
            pixels of the real images.
        rare_share: See ``rare_weight``.
        precision: "bf16" runs the forward pass under autocast; parameters stay float32.
        eval_every: Steps between evaluations, each with a checkpoint; the last step has one too.
        threads: CPU threads while training; another number changes the last bits of the result.

    Raises:
        ConfigError: A value is out of range.
    """

    name: str
    network: NetworkConfig = field(default_factory=NetworkConfig)
    weights: str | None = None
    steps: int
    batch_size: int = 16
    synthetic_share: float = 0.5
    crop: int
    shortest_edge: int | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.5
    jitter: bool = False
    optimiser: Literal["sgd", "adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    learning_rate: float
    head_factor: float = 1.0
    weight_decay: float = 0.01
    schedule: Literal["poly", "cosine"] = "poly"
    warmup_steps: int = 0
    clip_norm: float | None = None
    rare_weight: float = 1.0
    rare_share: float = 0.02
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_every: int
    threads: int = 1

    def __post_init__(self) -> None:
        rules = {
            "at least 1": ("steps", "batch_size", "crop", "eval_every", "threads"),
            "above 0": ("learning_rate", "head_factor", "rare_weight"),
            "above 0 or null": ("clip_norm", "shortest_edge"),
            "in [0, 1]": ("synthetic_share", "flip", "rare_share"),
            "in [0, 1)": ("betas",),
            "at least 0": ("weight_decay", "warmup_steps"),
            "a range above 0": ("scales",),
        }
        for rule, names in rules.items():
            for name in names:
                value = getattr(self, name)
                if not _VALUE_RULES[rule](value):
                    raise ConfigError(f"{name}: got {value}, expected {rule}")

    @property
    def synthetic_images(self) -> int:
        """Number of synthetic images in a batch; a half is rounded up."""
        return math.floor(self.synthetic_share * self.batch_size + 0.5)


def lr_factor(recipe: SegmenterRecipe, step: int) -> float:
    """Return the share of the peak rate at a step in [0, steps)."""
    done = step / recipe.steps
    warm = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
    if recipe.schedule == "poly":
        return warm * (1 - done) ** _POLY_POWER
    cosine = (1 + math.cos(math.pi * done)) / 2
    return warm * (_COSINE_FLOOR + (1 - _COSINE_FLOOR) * cosine)


SEGMENTER_RECIPES: Mapping[str, SegmenterRecipe] = {
    # Takes seconds to minutes on one CPU core.
    "unet-miniature": SegmenterRecipe(
        name="unet-miniature",
        steps=300,
        crop=64,
        learning_rate=3e-3,
        betas=(0.9, 0.98),
        schedule="cosine",
        warmup_steps=20,
        clip_norm=1.0,
        rare_weight=2.0,
        precision="bf16",
        eval_every=50,
    ),
    # UniMatch's settings for the few-label splits of VOC. The number of steps is that of
    # mmsegmentation's schedule: an epoch of few images is too short a unit.
    "matchmask-voc": SegmenterRecipe(
        name="matchmask-voc",
        network=NetworkConfig(name="deeplabv3plus-r101"),
        steps=40_000,
        crop=321,
        scales=(0.5, 2.0),
        optimiser="sgd",
        learning_rate=1e-3,
        head_factor=10.0,
        weight_decay=1e-4,
        eval_every=2_000,
        threads=4,
    ),
    # Mask2Former's own settings for ADE20K with a Swin-B of 384 pixels.
    "mask2former-ade": SegmenterRecipe(
        name="mask2former-ade",
        network=NetworkConfig(name="mask2former-swin-b"),
        steps=160_000,
        crop=640,
        shortest_edge=640,
        scales=(0.5, 2.0),
        jitter=True,
        learning_rate=1e-5,
        head_factor=10.0,
        weight_decay=0.05,
        clip_norm=0.01,
        eval_every=5_000,
        threads=4,
    ),
}


def named_segmenter_recipe(name: str, *overrides: Mapping[str, Any]) -> SegmenterRecipe:
    """Return a recipe by name with some fields changed.

    Args:
        name: A key of :data:`SEGMENTER_RECIPES`.
        overrides: Plain values by field, nested fields as nested mappings; a later one wins.

    Raises:
        ConfigError: There is no such recipe or field, or a value is out of range.
    """
    return recipe_with_overrides(SEGMENTER_RECIPES, name, overrides)
