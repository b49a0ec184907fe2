"""What the adapter jobs of all roles share: the task, its data, checkpoints and publication."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from loraseg.data import Dataset, Sample, few_shot, open_dataset
from loraseg.data.datasets import check_samples
from loraseg.errors import ConfigError, IntegrityError, LorasegError, StoreError
from loraseg.library import AdapterCard, CatalogEntry, Library
from loraseg.library.card import Role, check_name
from loraseg.storage import open_store
from loraseg.train.core.checkpoint import CheckpointStore
from loraseg.train.core.loop import LoopConfig
from loraseg.train.core.progress import Phase, ProgressCallback, ProgressReporter

__all__ = [
    "AdapterJob",
    "SharedResources",
    "TaskResult",
    "TrainingPlan",
    "TrainingRecipe",
    "TrainingRun",
    "TrainingTask",
    "open_samples",
    "run_each",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@runtime_checkable
class TrainingRecipe(Protocol):
    """What the recipes of all roles have in common."""

    @property
    def batch_size(self) -> int:
        """Images per step."""
        ...

    @property
    def threads(self) -> int:
        """CPU threads while training."""
        ...

    @property
    def loop(self) -> LoopConfig:
        """Steps and schedule."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTask:
    """One adapter to train, as plain settings. Each role has a subclass with its own recipe.

    Attributes:
        role: Key of :data:`loraseg.train.roles.ROLES`.
        name: Name of the adapter in the library.
        data: Dataset folder, a path or URI.
        split: Split to train on.
        val_split: Split to score on; not scored if the dataset has no split of that name.
        images: Number of training images, chosen by seed; None for all.
        base: The frozen model.
        recipe: Targets, rank and optimisation.
        seed: Seed of the choice of images, the initial pairs and the batches.
        data_order: "per_adapter" draws images and batches per adapter name. "per_dataset" draws
            them per dataset: adapters of one dataset and seed see the same batches and differ by
            their recipes only.
        library: Store URI to publish to.
        checkpoints: Store URI of checkpoints.
        skip_bad: Leave out unusable images instead of failing.
    """

    role: ClassVar[Role]

    name: str
    data: str
    split: str = "train"
    val_split: str = "val"
    images: int | None = None
    base: str = "miniature"
    recipe: TrainingRecipe
    seed: int = 0
    data_order: Literal["per_adapter", "per_dataset"] = "per_adapter"
    library: str
    checkpoints: str
    skip_bad: bool = False

    def __post_init__(self) -> None:
        """Check name and number of images.

        Raises:
            ConfigError: The name is not allowed, or ``images`` is below 1.
        """
        try:
            check_name(self.name)
        except IntegrityError as error:
            raise ConfigError(f"name: {error}") from error
        if self.images is not None and self.images < 1:
            raise ConfigError(f"images: got {self.images}, expected at least 1, or null for all")

    def required_uris(self) -> tuple[str, ...]:
        """Return the paths and URIs that a worker must reach; model names are not among them."""
        weights = (self.base,) if Path(self.base).is_absolute() else ()
        return self.data, self.library, self.checkpoints, *weights

    def group_key(self) -> object | None:
        """Return a key that is equal for tasks that share frozen work; None if it shares none."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """What running a task would do.

    Attributes:
        name: Name of the adapter.
        images: Number of training images.
        parameters: Number of trained values.
        steps: Number of training steps.
        digest: The task digest, see :func:`task_digest`.
        published: Whether the library holds the result already.
    """

    name: str
    images: int
    parameters: int
    steps: int
    digest: str
    published: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """The published version of a task.

    Attributes:
        name: Name of the adapter.
        digest: Digest of the adapter.
        version: Version in the library.
        metrics: Metrics of the adapter's card.
        skipped: Whether an earlier run had published it.
        resumed_from_step: Step of the checkpoint that training resumed from; 0 without one.
        seconds: Wall-clock time of the run.
        current: Whether the library serves this version under the name. False after a rollback, or
            if another task published later.
        skipped_files: Unusable files that ``skip_bad`` left out, each with its reason.
    """

    name: str
    digest: str
    version: int
    metrics: dict[str, float]
    skipped: bool
    resumed_from_step: int
    seconds: float
    current: bool = True
    skipped_files: tuple[str, ...] = ()


class SharedResources:
    """Memoised calls: models and datasets that several tasks of a group use."""

    def __init__(self) -> None:
        self._values: dict[object, Any] = {}

    def get(self, make: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Return ``make(*arguments, **options)``, computed once for equal arguments."""
        key = (make, arguments, tuple(sorted(options.items())))
        if key not in self._values:
            self._values[key] = make(*arguments, **options)
        return self._values[key]


@runtime_checkable
class AdapterJob(Protocol):
    """A task with its dataset opened and its models loaded. Each role has one implementation."""

    @classmethod
    def prepare(cls, task: Any, shared: SharedResources) -> "AdapterJob":
        """Open the data and load the models.

        Args:
            task: A task of the job's role.
            shared: Shared with the other tasks of the group.

        Raises:
            LorasegError: Data, weights or settings cannot be used.
        """
        ...

    def plan(self) -> TrainingPlan:
        """Check the data and describe what :meth:`run` would do.

        Raises:
            LorasegError: As in :meth:`run`.
        """
        ...

    def run(self, on_progress: ProgressCallback) -> TaskResult:
        """Train, score and publish; return the published version if the task is done already.

        Raises:
            DatasetError: The data cannot be used.
            StageError: The loss is not finite, or there is nothing to learn from.
            StoreError: A store cannot be reached.
        """
        ...


def run_each(
    jobs: Sequence[AdapterJob], on_progress: ProgressCallback
) -> list[TaskResult | LorasegError]:
    """Run jobs one after the other; return the result or the error of each."""
    outcomes: list[TaskResult | LorasegError] = []
    for job in jobs:
        try:
            outcomes.append(job.run(on_progress))
        except LorasegError as error:
            outcomes.append(error)
    return outcomes


def open_samples(task: TrainingTask, shared: SharedResources) -> tuple[Dataset, tuple[Sample, ...]]:
    """Return the dataset of a task and its training samples.

    Raises:
        DatasetError: The data cannot be used, or has fewer images than ``task.images``.
    """
    dataset = shared.get(open_dataset, task.data, skip_bad=task.skip_bad)
    samples = dataset.samples(task.split)
    if task.images is not None:
        keys = (task.name,) if task.data_order == "per_adapter" else ()
        samples = few_shot(samples, task.images, task.seed, *keys)
    return dataset, samples


@dataclasses.dataclass(slots=True)
class TrainingRun:
    """The data, checkpoints, progress and publication of one task.

    Attributes:
        task: The task.
        dataset: Its dataset.
        samples: Its training samples.
        training_digest: Digest of the training samples.
        digest: The task digest: part of the checkpoints' prefix and of the published card.
        steps: Number of training steps.
        batch_size: Images per step.
        progress: Reports steps and phases; reports nothing before :meth:`set_progress_callback`.
        started: ``time.monotonic()`` of the start.
    """

    task: TrainingTask
    dataset: Dataset
    samples: tuple[Sample, ...]
    training_digest: str
    digest: str
    steps: int
    batch_size: int
    progress: ProgressReporter = dataclasses.field(init=False)
    started: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.set_progress_callback(lambda progress: None)

    @property
    def stream_keys(self) -> tuple[str, ...]:
        """Keys of the random streams of the batches, beside the seed."""
        if self.task.data_order == "per_adapter":
            return "train", self.task.name
        return "train-data", self.training_digest

    def plan(self, parameters: int) -> TrainingPlan:
        """Return the plan of the task.

        Args:
            parameters: Number of trained values.

        Raises:
            StoreError: The library cannot be read.
        """
        return TrainingPlan(
            name=self.task.name,
            images=len(self.samples),
            parameters=parameters,
            steps=self.steps,
            digest=self.digest,
            published=self.published_entry() is not None,
        )

    def set_progress_callback(self, callback: ProgressCallback) -> None:
        """Report progress to ``callback`` from now on."""
        self.progress = ProgressReporter(self.task.name, self.steps, self.batch_size, callback)

    def set_phase(self, phase: Phase) -> None:
        """Report the start of a phase before or after training."""
        self.progress.set_phase(phase, 0 if phase == "encode" else self.steps)

    def checkpoint_store(self) -> CheckpointStore:
        """Return the checkpoint store of this task."""
        store = open_store(self.task.checkpoints)
        return CheckpointStore(store.with_prefix(f"{self.task.name}/{self.digest}"))

    def published_entry(self) -> CatalogEntry | None:
        """Return the newest library entry with this task's digest, None if there is none.

        Raises:
            StoreError: The library cannot be read.
        """
        library = Library(open_store(self.task.library))
        for entry in reversed(library.versions(self.task.name)):
            if entry.card.recipe.get("task_digest") == self.digest:
                return entry
        return None

    def find_published(self) -> TaskResult | None:
        """Return the result of an earlier run that published this task, None if there is none.

        Raises:
            StoreError: The library cannot be read.
        """
        entry = self.published_entry()
        if entry is None:
            return None
        logger.info("%s: already published as version %d", self.task.name, entry.version)
        # A run that was killed between publishing and clearing left its checkpoints.
        self._clear_checkpoints()
        return self._result(entry, skipped=True, resumed_from_step=0)

    def publish(
        self, files: Mapping[str, bytes], card: AdapterCard, resumed_from_step: int
    ) -> TaskResult:
        """Publish an adapter and delete its checkpoints.

        Args:
            files: Files of the adapter by name.
            card: Its card, with :attr:`digest` as ``recipe["task_digest"]``.
            resumed_from_step: Step of the checkpoint that training resumed from.

        Raises:
            StoreError: The library cannot be written.
        """
        self.set_phase("publish")
        entry = Library(open_store(self.task.library)).publish(self.task.name, files, card)
        self._clear_checkpoints()
        result = self._result(entry, skipped=False, resumed_from_step=resumed_from_step)
        logger.info(
            "%s: published version %d, %.1f s", self.task.name, entry.version, result.seconds
        )
        return result

    def validation_samples(self) -> tuple[Sample, ...]:
        """Return the samples of the validation split, empty if the dataset has no such split."""
        split = self.task.val_split
        return self.dataset.samples(split) if split in self.dataset.splits else ()

    def check_images(self, shared: SharedResources) -> None:
        """Decode all training and validation files, so that broken ones fail before training.

        Raises:
            DatasetError: An image or mask is broken.
        """
        samples = (*self.samples, *self.validation_samples())
        shared.get(check_samples, self.dataset, samples)

    def _clear_checkpoints(self) -> None:
        """Delete the checkpoints; a failure is only logged, since the adapter is published."""
        try:
            self.checkpoint_store().clear()
        except StoreError as error:
            logger.warning("checkpoints not deleted: %s", error)

    def _result(self, entry: CatalogEntry, *, skipped: bool, resumed_from_step: int) -> TaskResult:
        metrics = {
            key: float(value)
            for key, value in entry.card.metrics.items()
            if isinstance(value, int | float)
        }
        return TaskResult(
            name=entry.name,
            digest=entry.digest,
            version=entry.version,
            metrics=metrics,
            skipped=skipped,
            resumed_from_step=resumed_from_step,
            seconds=time.monotonic() - self.started,
            current=entry.current,
            skipped_files=tuple(f"{path}: {reason}" for path, reason in self.dataset.skipped),
        )
