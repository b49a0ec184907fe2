"""Run an evaluation: score the grid, choose K and tau across folds, score all methods."""

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from loraseg import config as configuration
from loraseg.backbones.weights import absolute_spec
from loraseg.data import digest_samples, load_pair, open_dataset
from loraseg.errors import AdapterNotFoundError, ConfigError
from loraseg.evaluate.leave_one_out import (
    EvaluationContext,
    ScoringConfig,
    TargetDomain,
    TargetScorer,
)
from loraseg.evaluate.results import EvaluationResults
from loraseg.evaluate.tuning import (
    HyperparameterGrid,
    Hyperparameters,
    folds_by_family,
    select_hyperparameters,
)
from loraseg.inference.config import SegmenterConfig
from loraseg.inference.loading import LoadedModels, load_models
from loraseg.revision import code_revision
from loraseg.segment.metrics import hmean
from loraseg.storage import absolute_uri

__all__ = [
    "EvaluationConfig",
    "EvaluationDomain",
    "EvaluationTask",
    "evaluate",
    "run_evaluation_task",
]

logger = logging.getLogger(__name__)

# Applies a function to every piece of work, in order: a plain loop, or Ray.
OrderedMap = Callable[
    [Callable[["EvaluationTask"], Any], Sequence["EvaluationTask"]], Iterable[Any]
]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationDomain:
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
class EvaluationConfig(SegmenterConfig):
    """What is evaluated.

    Attributes:
        library: URI of the adapter library.
        output: Folder for results.json, report.html and the resolved config.
        domains: What is scored; every one in turn is the target.
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
    domains: tuple[EvaluationDomain, ...]
    candidates: tuple[str, ...] = ()
    lonely: tuple[str, ...] = ()
    grid: HyperparameterGrid = field(default_factory=HyperparameterGrid)
    folds: int | None = None
    tuning_images: int | None = 8
    images: int | None = None
    skip_bad: bool = False
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
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

    def resolved(self) -> "EvaluationConfig":
        """Return the config with addresses that hold in any process, whatever its folder."""
        return replace(
            self,
            library=absolute_uri(self.library),
            base=absolute_spec(self.base),
            encoder=absolute_spec(self.encoder),
            domains=tuple(replace(item, data=absolute_uri(item.data)) for item in self.domains),
        )

    def fixed_hyperparameters(self) -> Hyperparameters | None:
        """Return the given K and tau, None if they are to be chosen."""
        if self.k is None or self.temperature is None:
            return None
        return Hyperparameters(k=self.k, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """One domain's share: a score for every setting of the grid, or all methods at one setting.

    Self-contained and safe to run twice, so that any process of a cluster may take it.
    """

    config: EvaluationConfig
    domain: EvaluationDomain
    generation: int
    setting: Hyperparameters | None = None


def evaluate(config: EvaluationConfig, ordered_map: OrderedMap = map) -> EvaluationResults:
    """Score all domains leave-one-out.

    Args:
        config: What is evaluated.
        ordered_map: Applies a function to every piece of work, in order; places it on a cluster.

    Raises:
        ConfigError: Too few families for the folds, or a domain has no other adapter to mix.
        AdapterNotFoundError: A candidate is not in the library.
        LorasegError: As raised by the store, the data, the base or the adapters.
    """
    models = load_models(config, config.library)
    _check_candidates(config, models)
    resolved = config.resolved()
    works = [
        EvaluationTask(config=resolved, domain=domain, generation=models.generation)
        for domain in resolved.domains
    ]
    settings, tuning = _select_hyperparameters(config, works, ordered_map)
    scored = [replace(work, setting=settings[work.domain.name]) for work in works]
    return EvaluationResults(
        provenance=_provenance(config, models),
        tuning=tuning,
        targets=tuple(ordered_map(run_evaluation_task, scored)),
        isolated=config.lonely,
    )


def run_evaluation_task(task: EvaluationTask) -> Any:
    """Score one domain: a list of the grid's mIoU without a setting, else its `TargetScores`."""
    started = time.perf_counter()
    config = task.config
    # The library is pinned to a generation: all domains see the same adapters, whoever publishes.
    models = _load_models_once(config, task.generation)
    bench = EvaluationContext(
        base=models.base,
        entries=models.pool.entries,
        load_adapter=models.pool.load,
        measure_distances=models.distances,
        candidates=frozenset(config.candidates) or None,
    )
    scorer = TargetScorer(bench, _target_domain(config, task.domain), config.scoring)
    if task.setting is None:
        result: Any = scorer.score_grid(config.grid.combinations(), config.tuning_images)
    else:
        result = scorer.score_methods(task.setting)
    what = "grid" if task.setting is None else "all methods"
    logger.info("%s: scored %s in %.1f s", task.domain.name, what, time.perf_counter() - started)
    return result


# A process that scores several domains, or one domain twice, reads the models once.
@functools.lru_cache(maxsize=1)
def _load_models_once(config: EvaluationConfig, generation: int) -> LoadedModels:
    return load_models(config, config.library, generation)


def _target_domain(config: EvaluationConfig, domain: EvaluationDomain) -> TargetDomain:
    dataset = open_dataset(domain.data, skip_bad=config.skip_bad)
    samples = dataset.samples(domain.split)[: config.images]
    return TargetDomain(
        name=domain.name,
        family=domain.family or domain.name,
        classes=dataset.label_space.names,
        samples=samples,
        load=functools.partial(load_pair, dataset),
        digest=digest_samples(dataset, samples),
    )


def _select_hyperparameters(
    config: EvaluationConfig, tasks: Sequence[EvaluationTask], ordered_map: OrderedMap
) -> tuple[dict[str, Hyperparameters], dict[str, Any]]:
    """Return K and tau of every domain, and how they were found."""
    names = [work.domain.name for work in tasks]
    if (fixed := config.fixed_hyperparameters()) is not None:
        return dict.fromkeys(names, fixed), {}
    families = {domain.name: domain.family or domain.name for domain in config.domains}
    folds = folds_by_family(families, count=config.folds, seed=config.seed)
    scores = dict(zip(names, ordered_map(run_evaluation_task, tasks), strict=True))
    grid = config.grid.combinations()
    tuning = {
        "grid": [asdict(setting) for setting in grid],
        "folds": folds,
        "miou": scores,
        "hmean": [hmean([row[index] for row in scores.values()]) for index in range(len(grid))],
    }
    return select_hyperparameters(scores, folds, grid), tuning


def _check_candidates(config: EvaluationConfig, segmenter: LoadedModels) -> None:
    known = {entry.name for entry in segmenter.pool.entries}
    if missing := sorted(set(config.candidates) - known):
        raise AdapterNotFoundError(
            f"candidates {', '.join(missing)}: not among the adapters of {config.library} for "
            f"base {segmenter.base.digest} "
            f"({', '.join(sorted(known)) or segmenter.pool.empty_reason})"
        )


def _provenance(config: EvaluationConfig, segmenter: LoadedModels) -> dict[str, Any]:
    return {
        "config": configuration.to_dict(config),
        "code_revision": code_revision(),
        "seed": config.seed,
        "base": {"name": segmenter.base.name, "digest": segmenter.base.digest},
        "encoder": segmenter.encoder.encoder_id,
        "clip_attention_lora": segmenter.base.clip_attention_lora,
        "library_generation": segmenter.generation,
        "adapters": {
            entry.name: {"version": entry.version, "digest": entry.digest}
            for entry in segmenter.pool.entries
        },
    }
