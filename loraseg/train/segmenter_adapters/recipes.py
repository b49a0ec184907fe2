"""How an adapter is trained: one config, and a function for each published recipe."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

from loraseg import config as configuration
from loraseg.adapters.targets.catseg import TARGET_RULES
from loraseg.data.transforms import AugmentConfig
from loraseg.errors import ConfigError
from loraseg.train.core.loop import LoopConfig

__all__ = [
    "RECIPES",
    "RULES_WITHOUT_CLIP",
    "AdapterRecipe",
    "DomainKind",
    "deep_merge",
    "group_signature",
    "miniature",
    "named_recipe",
    "recipe_with_overrides",
    "semla",
]

RecipeT = TypeVar("RecipeT")

# Rules of TARGET_RULES that adapt nothing of CLIP: its features are those of the base.
RULES_WITHOUT_CLIP = frozenset({"aggregator"})

DomainKind = Literal["acdc", "muses", "cs", "bdd", "mv", "a150", "idd", "pc59", "nyu", "coconutL"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRecipe:
    """Everything that decides what an adapter becomes, apart from base, data and seed.

    Attributes:
        name: Which recipe this is or was derived from; for people.
        targets: Rule for the layers that are adapted, a key of
            :data:`loraseg.adapters.targets.catseg.TARGET_RULES`.
        rank: r of every pair.
        alpha: Scale of the update is alpha / rank.
        learning_rate: One rate for all pairs, at its peak.
        weight_decay: Of AdamW, on every pair.
        batch_size: Images per step.
        resize: (height, width) that image and mask are resized to before augmentation, both by
            the nearest pixel; None keeps their size.
        augment: Crop, flip and colour jitter.
        mask_ignored: Leave ignored pixels out of the loss. The official loss (False) gives them
            an all-zero target, which pushes every class down (methods A.6).
        clip_attention_lora: "active" adapts q, k and v of CLIP. "inert" trains as the official
            code, where those pairs are never called and stay zero (methods B.1).
        pooled: Pool by two before class attention as in CAT-Seg's own training; SemLA's script
            trains without (methods B.2).
        loop: Steps, schedule, clipping and precision.
        threads: CPU threads while training. The last bits of a result depend on it.
    """

    name: str
    targets: str = "semla"
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    batch_size: int = 2
    resize: tuple[int, int] | None = None
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    mask_ignored: bool = False
    clip_attention_lora: Literal["active", "inert"] = "active"
    pooled: bool = False
    loop: LoopConfig
    threads: int = 1

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.targets not in TARGET_RULES:
            raise ConfigError(f"targets: got {self.targets!r}, known: {', '.join(TARGET_RULES)}")
        for field in ("rank", "batch_size", "threads"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}: got {getattr(self, field)}, expected at least 1")
        for field in ("alpha", "learning_rate"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(f"{field}: got {getattr(self, field)}, expected above 0")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"weight_decay: got {self.weight_decay}, expected at least 0")
        if self.resize is not None and min(self.resize) < 1:
            raise ConfigError(f"resize: got {self.resize}, expected (height, width) of at least 1")


@dataclasses.dataclass(frozen=True)
class _PublishedRow:
    """One row of the table in methods B.2."""

    batch: int
    rate: float
    steps: int
    decay: float
    warmup_factor: float


_SEMLA_TABLE: Mapping[DomainKind, _PublishedRow] = {
    "acdc": _PublishedRow(2, 1e-4, 2_000, 1e-4, 0.01),
    # The authors changed the steps by hand because of over-fitting and do not say to what.
    "muses": _PublishedRow(2, 1e-5, 3_000, 1e-4, 0.01),
    "cs": _PublishedRow(4, 1e-4, 20_000, 1e-5, 0.01),
    "bdd": _PublishedRow(4, 1e-4, 10_000, 1e-5, 0.01),
    "mv": _PublishedRow(2, 1e-4, 6_000, 1e-5, 0.01),
    "a150": _PublishedRow(4, 1e-4, 20_000, 1e-5, 0.1),
    "idd": _PublishedRow(4, 1e-4, 20_000, 1e-5, 0.1),
    "pc59": _PublishedRow(4, 1e-4, 4_000, 1e-5, 0.1),
    "nyu": _PublishedRow(4, 1e-4, 4_000, 1e-5, 0.1),
    "coconutL": _PublishedRow(4, 1e-4, 86_154, 1e-5, 0.1),
}


def semla(domain_kind: DomainKind = "acdc") -> AdapterRecipe:
    """Return SemLA's published training of one kind of domain (methods B.2).

    Differs from the official code where that is a slip: the guidance hooks are right, and the
    attention pairs of CLIP really train unless ``clip_attention_lora`` is set to "inert".

    Args:
        domain_kind: A row of the published table; "cs" images are first resized to 1024 x 512.
    """
    row = _SEMLA_TABLE[domain_kind]
    return AdapterRecipe(
        name=f"semla-{domain_kind}",
        learning_rate=row.rate,
        weight_decay=row.decay,
        batch_size=row.batch,
        resize=(512, 1024) if domain_kind == "cs" else None,
        loop=LoopConfig(
            steps=row.steps,
            warmup_steps=1_000,
            warmup_factor=row.warmup_factor,
            clip_norm=0.01,
            checkpoint_every=500,
        ),
    )


def miniature() -> AdapterRecipe:
    """Return the recipe for the miniature CAT-Seg: seconds on one CPU core.

    Few steps at a low rate and half the usual scale on purpose: adapters that overshoot their own
    domain hurt its neighbours as soon as they are fused.
    """
    return AdapterRecipe(
        name="miniature",
        alpha=8.0,
        learning_rate=1e-3,
        batch_size=6,
        augment=AugmentConfig(crop=64, shortest_edge=(64,), jitter=False),
        loop=LoopConfig(
            steps=60, warmup_steps=6, clip_norm=1.0, precision="bf16", checkpoint_every=20
        ),
    )


RECIPES: Mapping[str, Callable[[], AdapterRecipe]] = {
    "miniature": miniature,
    "semla": semla,
    **{f"semla-{kind}": functools.partial(semla, kind) for kind in _SEMLA_TABLE},
}


def named_recipe(name: str, *overrides: Mapping[str, Any]) -> AdapterRecipe:
    """Return a recipe by name with some fields changed.

    Args:
        name: A key of :data:`RECIPES`; "semla" alone is "semla-acdc".
        overrides: Plain values by field, nested fields as nested mappings; a later one wins.

    Raises:
        ConfigError: There is no such recipe or field, or a value is out of range.
    """
    return recipe_with_overrides({key: make() for key, make in RECIPES.items()}, name, overrides)


def group_signature(recipe: AdapterRecipe) -> AdapterRecipe:
    """Return a recipe with all that adapters trained on the same batches may differ in made equal.

    Those are name, rank, alpha, rates, what happens to ignored pixels, and the loop but for its
    precision.
    """
    return dataclasses.replace(
        recipe,
        name="",
        rank=1,
        alpha=1.0,
        learning_rate=1.0,
        weight_decay=0.0,
        mask_ignored=False,
        loop=LoopConfig(steps=1, precision=recipe.loop.precision),
    )


def recipe_with_overrides(
    recipes: Mapping[str, RecipeT], name: str, overrides: Sequence[Mapping[str, Any]]
) -> RecipeT:
    """Return one of some recipes with fields changed.

    Args:
        recipes: By name.
        name: Which.
        overrides: Plain values by field, nested fields as nested mappings; a later one wins.

    Raises:
        ConfigError: There is no such recipe or field, or a value is out of range.
    """
    if name not in recipes:
        raise ConfigError(f"recipe: got {name!r}, known: {', '.join(recipes)}")
    recipe = recipes[name]
    values = deep_merge(configuration.to_dict(recipe), *overrides)
    return configuration.build(type(recipe), values, where=f"recipe {name}")


def deep_merge(values: Mapping[str, Any], *overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values with some changed, nested mappings key by key; a later change wins."""
    merged = dict(values)
    for key, change in (item for changes in overrides for item in changes.items()):
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(change, Mapping):
            inner = cast(Mapping[str, Any], old), cast(Mapping[str, Any], change)
            merged[key] = deep_merge(*inner)
        else:
            merged[key] = change
    return merged
