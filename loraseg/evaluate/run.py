"""Run an evaluation: score the grid, choose K and tau across folds, score all methods."""

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from loraseg import config as configuration
from loraseg.backbones.source import absolute_spec
from loraseg.data.readers.folder import DatasetFolder
from loraseg.engine.assemble import AttentionLora, Equipment, Precision, Wanted, equip
from loraseg.errors import AdapterNotFoundError, ConfigError
from loraseg.evaluate.leave_one_out import Bench, Scoring, Target, TargetScorer
from loraseg.evaluate.results import Results
from loraseg.evaluate.tuning import Grid, Setting, choose, folds_by_family
from loraseg.revision import code_revision
from loraseg.segment.metrics import hmean
from loraseg.storage import absolute

__all__ = ["Domain", "EvaluationConfig", "Work", "evaluate", "run_work"]

logger = logging.getLogger(__name__)

# Applies a function to every piece of work, in order: a plain loop, or Ray.
Spread = Callable[[Callable[["Work"], Any], Sequence["Work"]], Iterable[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One dataset folder; its own adapter in the library has the same name.

    Attributes:
        name: Of the domain and of its adapter.
        data: Dataset folder.
        family: Relatives share a family, so that they share a fold; the name if empty.
        split: Which split is scored.
    """

    name: str
    data: str
    family: str = ""
    split: str = "val"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What is evaluated.

    Attributes:
        library: URI of the adapter library.
        output: Folder for results.json, report.html and the resolved config.
        domains: What is scored; every one in turn is the target.
        base: The frozen segmenter.
        encoder: The CLIP that the library's centroids were made with.
        clip_attention_lora: Whether adapters of the CLIP attention act (methods B.1).
        precision: What the segmenter computes in.
        candidates: Names of adapters that may be mixed; all if empty. Oracles are not bound by it.
        lonely: Domains without relatives, left out of the second h-mean.
        k: K for all domains; with ``temperature`` it replaces the choice by cross-validation.
        temperature: tau for all domains.
        grid: What is tried otherwise.
        folds: Number of folds of domains; None for one a family, so that each family is scored with
            what is best for all others.
        tuning_images: First images of each domain that the choice looks at; None for all.
        images: First images of each domain that are scored; None for all.
        skip_bad: Leave out unusable images rather than stop.
        scoring: How each image is scored.
        seed: For the order in which families are dealt to folds.
    """

    library: str
    output: str
    domains: tuple[Domain, ...]
    base: str = "miniature"
    encoder: str = "miniature"
    clip_attention_lora: AttentionLora = "as_trained"
    precision: Precision = "fp32"
    candidates: tuple[str, ...] = ()
    lonely: tuple[str, ...] = ()
    k: int | None = None
    temperature: float | None = None
    grid: Grid = field(default_factory=Grid)
    folds: int | None = None
    tuning_images: int | None = 8
    images: int | None = None
    skip_bad: bool = False
    scoring: Scoring = field(default_factory=Scoring)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.domains:
            raise ConfigError("domains: expected at least one")
        names = [domain.name for domain in self.domains]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"domains: {', '.join(doubled)} named twice")
        if unknown := sorted(set(self.lonely) - set(names)):
            raise ConfigError(f"lonely: {', '.join(unknown)} not among the domains")
        if (self.k is None) != (self.temperature is None):
            raise ConfigError("k and temperature: give both, or none to choose them on the grid")

    def plain(self) -> "EvaluationConfig":
        """Return a config of this very class, without what a subclass added.

        Workers of a cluster can import it, whereas a job's own class lives in ``__main__``.
        """
        names = [item.name for item in fields(EvaluationConfig)]
        return EvaluationConfig(**{name: getattr(self, name) for name in names})

    def resolved(self) -> "EvaluationConfig":
        """Return the config with addresses that hold in any process, whatever its folder."""
        return replace(
            self,
            library=absolute(self.library),
            base=absolute_spec(self.base),
            encoder=absolute_spec(self.encoder),
            domains=tuple(replace(item, data=absolute(item.data)) for item in self.domains),
        )

    def fixed(self) -> Setting | None:
        """Return the given K and tau, None if they are to be chosen."""
        if self.k is None or self.temperature is None:
            return None
        return Setting(k=self.k, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One domain's share: a score for every setting of the grid, or all methods at one setting.

    Self-contained and safe to run twice, so that any process of a cluster may take it.
    """

    config: EvaluationConfig
    domain: Domain
    generation: int
    setting: Setting | None = None


def evaluate(config: EvaluationConfig, spread: Spread = map) -> Results:
    """Score all domains leave-one-out.

    Args:
        config: What is evaluated.
        spread: Applies a function to every piece of work, in order; places it on a cluster.

    Raises:
        ConfigError: Too few families for the folds, or a domain has no other adapter to mix.
        AdapterNotFoundError: A candidate is not in the library.
        LorasegError: As raised by the store, the data, the base or the adapters.
    """
    equipment = equip(_wanted(config))
    _check_candidates(config, equipment)
    resolved = config.resolved()
    works = [
        Work(config=resolved, domain=domain, generation=equipment.generation)
        for domain in resolved.domains
    ]
    settings, tuning = _settings(config, works, spread)
    scored = [replace(work, setting=settings[work.domain.name]) for work in works]
    return Results(
        provenance=_provenance(config, equipment),
        tuning=tuning,
        targets=tuple(spread(run_work, scored)),
        lonely=config.lonely,
    )


def run_work(work: Work) -> Any:
    """Score one domain: a list of the grid's mIoU without a setting, else its `TargetScores`."""
    started = time.perf_counter()
    config = work.config
    # The library is pinned to a generation: all domains see the same adapters, whoever publishes.
    equipment = _equip_once(_wanted(config, work.generation))
    bench = Bench(
        base=equipment.base,
        entries=equipment.pool.entries,
        load=equipment.pool.load,
        measure=equipment.measure,
        candidates=frozenset(config.candidates) or None,
    )
    scorer = TargetScorer(bench, _target(config, work.domain), config.scoring)
    if work.setting is None:
        result: Any = scorer.grid(config.grid.settings(), config.tuning_images)
    else:
        result = scorer.score(work.setting)
    what = "grid" if work.setting is None else "all methods"
    logger.info("%s: scored %s in %.1f s", work.domain.name, what, time.perf_counter() - started)
    return result


# A process that scores several domains, or one domain twice, reads the models once.
_equip_once = functools.lru_cache(maxsize=1)(equip)


def _wanted(config: EvaluationConfig, generation: int | None = None) -> Wanted:
    return Wanted(
        library=config.library,
        base=config.base,
        encoder=config.encoder,
        clip_attention_lora=config.clip_attention_lora,
        precision=config.precision,
        generation=generation,
    )


def _target(config: EvaluationConfig, domain: Domain) -> Target:
    folder = DatasetFolder.open(domain.data, skip_bad=config.skip_bad)
    samples = folder.samples(domain.split)[: config.images]
    return Target(
        name=domain.name,
        family=domain.family or domain.name,
        classes=folder.label_space.names,
        samples=samples,
        load=folder.load,
        digest=folder.digest(samples),
    )


def _settings(
    config: EvaluationConfig, works: Sequence[Work], spread: Spread
) -> tuple[dict[str, Setting], dict[str, Any]]:
    """Return K and tau of every domain, and how they were found."""
    names = [work.domain.name for work in works]
    if (fixed := config.fixed()) is not None:
        return dict.fromkeys(names, fixed), {}
    families = {domain.name: domain.family or domain.name for domain in config.domains}
    folds = folds_by_family(families, count=config.folds, seed=config.seed)
    scores = dict(zip(names, spread(run_work, works), strict=True))
    grid = config.grid.settings()
    tuning = {
        "grid": [asdict(setting) for setting in grid],
        "folds": folds,
        "miou": scores,
        "hmean": [hmean([row[index] for row in scores.values()]) for index in range(len(grid))],
    }
    return choose(scores, folds, grid), tuning


def _check_candidates(config: EvaluationConfig, equipment: Equipment) -> None:
    known = {entry.name for entry in equipment.pool.entries}
    if missing := sorted(set(config.candidates) - known):
        raise AdapterNotFoundError(
            f"candidates {', '.join(missing)}: not among the adapters of {config.library} for "
            f"base {equipment.base.digest} ({', '.join(sorted(known)) or equipment.pool.vacancy})"
        )


def _provenance(config: EvaluationConfig, equipment: Equipment) -> dict[str, Any]:
    return {
        "config": configuration.to_dict(config),
        "code_revision": code_revision(),
        "seed": config.seed,
        "base": {"name": equipment.base.name, "digest": equipment.base.digest},
        "encoder": equipment.encoder.encoder_id,
        "clip_attention_lora": equipment.base.model.config.clip_attention_lora,
        "library_generation": equipment.generation,
        "adapters": {
            entry.name: {"version": entry.version, "digest": entry.digest}
            for entry in equipment.pool.entries
        },
    }
