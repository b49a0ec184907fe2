"""The evaluation: score the grid, choose K and tau across folds, score all methods."""

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

# Applies a function to every task and yields the results in order: ``map``, or tasks on Ray.
OrderedMap = Callable[
    [Callable[["EvaluationTask"], Any], Sequence["EvaluationTask"]], Iterable[Any]
]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationDomain:
    """A domain to score.

    Attributes:
        name: Name of the domain and of its own adapter in the library.
        data: Dataset, a path or URI.
        family: Related domains have the same family and therefore the same fold; empty for the
            name of the domain.
        split: Split that is scored.
    """

    name: str
    data: str
    family: str = ""
    split: str = "val"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig(SegmenterConfig):
    """Settings of an evaluation.

    With ``k`` and ``temperature``, K and tau are the same for all domains; without them they are
    chosen by cross-validation.

    Attributes:
        library: URI of the adapter library.
        output: Folder or store URI for results.json, table.txt and report.html.
        domains: The domains; each is scored without its own adapter.
        candidates: Names of the adapters that may be mixed; all if empty. The oracle may use other
            adapters as well.
        lonely: Domains without related ones, which the second h-mean leaves out.
        grid: Values of K and tau for the cross-validation.
        folds: Number of folds; None for one fold per family, so that K and tau of a family are
            chosen on all other families.
        tuning_images: Number of images per domain for the cross-validation; None for all.
        images: Number of images per domain that are scored; None for all.
        skip_bad: Leave out unusable images instead of raising an error.
        scoring: How each image is scored.
        seed: Seed of the order in which families are assigned to folds.

    Raises:
        ConfigError: ``domains`` is empty or has duplicates, ``lonely`` has other names, or only one
            of ``k`` and ``temperature`` is set.
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
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"domains: {', '.join(duplicates)} named twice")
        if unknown := sorted(set(self.lonely) - set(names)):
            raise ConfigError(f"lonely: {', '.join(unknown)} not among the domains")
        if (self.k is None) != (self.temperature is None):
            raise ConfigError("k and temperature: set both, or none to choose them on the grid")

    def resolved(self) -> "EvaluationConfig":
        """Return the config with absolute paths and URIs, which do not depend on the process."""
        return replace(
            self,
            library=absolute_uri(self.library),
            base=absolute_spec(self.base),
            encoder=absolute_spec(self.encoder),
            domains=tuple(
                replace(domain, data=absolute_uri(domain.data)) for domain in self.domains
            ),
        )

    def fixed_hyperparameters(self) -> Hyperparameters | None:
        """Return K and tau of the config; None if they are chosen by cross-validation."""
        if self.k is None or self.temperature is None:
            return None
        return Hyperparameters(k=self.k, temperature=self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """Scoring of one domain: SemLA on the whole grid, or all methods with one setting.

    A task is self-contained and safe to repeat, so it can run in any process of a cluster.

    Attributes:
        config: Settings of the evaluation, with absolute URIs.
        domain: The domain.
        generation: Generation of the library.
        setting: K and tau for all methods; None for SemLA on the grid.
    """

    config: EvaluationConfig
    domain: EvaluationDomain
    generation: int
    setting: Hyperparameters | None = None


def evaluate(config: EvaluationConfig, ordered_map: OrderedMap = map) -> EvaluationResults:
    """Score all domains leave-one-out.

    Args:
        config: Settings of the evaluation.
        ordered_map: Applies a function to every task and yields the results in order.

    Raises:
        ConfigError: There are too few families for the folds, or a domain has no other adapter.
        AdapterNotFoundError: A candidate is not in the library.
        LorasegError: The store, the data, the base or the adapters cannot be used.
    """
    models = load_models(config, config.library)
    _check_candidates(config, models)
    resolved = config.resolved()
    tasks = [
        EvaluationTask(config=resolved, domain=domain, generation=models.generation)
        for domain in resolved.domains
    ]
    settings, tuning = _select_hyperparameters(config, tasks, ordered_map)
    scoring_tasks = [replace(task, setting=settings[task.domain.name]) for task in tasks]
    return EvaluationResults(
        provenance=_provenance(config, models),
        tuning=tuning,
        targets=tuple(ordered_map(run_evaluation_task, scoring_tasks)),
        isolated=config.lonely,
    )


def run_evaluation_task(task: EvaluationTask) -> Any:
    """Score one domain.

    Returns:
        The list of SemLA's mIoU on the grid without a setting, else ``TargetScores``.

    Raises:
        LorasegError: The store, the data, the base or the adapters cannot be used.
    """
    started = time.perf_counter()
    config = task.config
    # The generation is fixed, so that all domains use the same adapters during publications.
    models = _load_models_once(config, task.generation)
    context = EvaluationContext(
        base=models.base,
        entries=models.pool.entries,
        load_adapter=models.pool.load,
        measure_distances=models.distances,
        candidates=frozenset(config.candidates) or None,
    )
    scorer = TargetScorer(context, _target_domain(config, task.domain), config.scoring)
    if task.setting is None:
        result: Any = scorer.score_grid(config.grid.combinations(), config.tuning_images)
    else:
        result = scorer.score_methods(task.setting)
    scored = "the grid" if task.setting is None else "all methods"
    logger.info("%s: scored %s in %.1f s", task.domain.name, scored, time.perf_counter() - started)
    return result


# Cached, so that a process that runs several tasks loads the models once.
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
    """Return K and tau of every domain, and the details of the cross-validation."""
    names = [task.domain.name for task in tasks]
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


def _check_candidates(config: EvaluationConfig, models: LoadedModels) -> None:
    available = {entry.name for entry in models.pool.entries}
    if missing := sorted(set(config.candidates) - available):
        raise AdapterNotFoundError(
            f"candidates {', '.join(missing)}: not among the adapters of {config.library} for "
            f"base {models.base.digest} "
            f"({', '.join(sorted(available)) or models.pool.empty_reason})"
        )


def _provenance(config: EvaluationConfig, models: LoadedModels) -> dict[str, Any]:
    return {
        "config": configuration.to_dict(config),
        "code_revision": code_revision(),
        "seed": config.seed,
        "base": {"name": models.base.name, "digest": models.base.digest},
        "encoder": models.encoder.encoder_id,
        "clip_attention_lora": models.base.clip_attention_lora,
        "library_generation": models.generation,
        "adapters": {
            entry.name: {"version": entry.version, "digest": entry.digest}
            for entry in models.pool.entries
        },
    }
