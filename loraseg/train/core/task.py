"""A unit of work of either role: its data, its checkpoints, its place in the library."""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from loraseg import config as configuration
from loraseg.data import Dataset, Sample, few_shot, open_dataset
from loraseg.data.datasets import check_samples
from loraseg.errors import ConfigError, IntegrityError, StoreError
from loraseg.library import AdapterCard, CatalogEntry, Library
from loraseg.library.card import check_name
from loraseg.storage import open_store
from loraseg.train.core.checkpoint import CheckpointStore
from loraseg.train.core.progress import Phase, ProgressCallback, ProgressReporter

__all__ = [
    "SharedResources",
    "TaskResult",
    "TrainingPlan",
    "TrainingRun",
    "TrainingTask",
    "open_samples",
    "task_digest",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTask:
    """What to train on, and where the result goes; each role adds how.

    Attributes:
        name: The adapter's name in the library.
        data: Dataset folder, a path or URI.
        split: Split to train on.
        val_split: Split to score on; skipped if the folder has none of that name.
        images: Train on so many images, chosen by seed; None for all.
        base: The frozen model.
        seed: Decides the choice of images, the initial values and the batches.
        data_order: "per_adapter" draws images and batches for each adapter's name. "per_dataset"
            draws them for the data alone: adapters of one dataset and seed see the same batches,
            so that they differ by their recipes only.
        library: Store URI to publish to.
        checkpoints: Store URI for unfinished work.
        skip_bad: Leave out unusable images rather than fail.
    """

    name: str
    data: str
    split: str = "train"
    val_split: str = "val"
    images: int | None = None
    base: str = "miniature"
    seed: int = 0
    data_order: Literal["per_adapter", "per_dataset"] = "per_adapter"
    library: str
    checkpoints: str
    skip_bad: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without the data.

        Raises:
            ConfigError: The name or the number of images is not possible.
        """
        try:
            check_name(self.name)
        except IntegrityError as error:
            raise ConfigError(f"name: {error}") from error
        if self.images is not None and self.images < 1:
            raise ConfigError(f"images: got {self.images}, expected at least 1, or null for all")

    def required_uris(self) -> tuple[str, ...]:
        """Return all addresses that a worker has to reach; names of models are none."""
        weights = (self.base,) if Path(self.base).is_absolute() else ()
        return self.data, self.library, self.checkpoints, *weights


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """What a task would do; ``digest`` tells tasks with different results apart."""

    name: str
    images: int
    parameters: int
    steps: int
    digest: str
    published: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """What became of a task: the published version, and whether anything had to be done.

    Attributes:
        digest: The adapter's.
        current: Whether the library hands out this version under the name; not so after a
            rollback, or when another task has published since.
        metrics: By name; empty without a validation split.
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


def task_digest(version: int, parts: Mapping[str, Any], *, compact: bool = True) -> str:
    """Return the sha256 of everything that decides a task's result, as canonical JSON.

    Equal digests mean equal results: they select checkpoints and published versions, so the JSON of
    existing tasks must not change.

    Args:
        version: Raised when the same parts would give another result; the key "format" of the JSON.
        parts: Config dataclasses and plain JSON values by name.
        compact: Write the JSON without spaces. Closed-set runs are digested with spaces.
    """
    content = {
        "format": version,
        **{
            name: configuration.to_dict(part) if dataclasses.is_dataclass(part) else part
            for name, part in parts.items()
        },
    }
    separators = (",", ":") if compact else None
    text = json.dumps(content, sort_keys=True, separators=separators)
    return hashlib.sha256(text.encode()).hexdigest()


class SharedResources:
    """What the tasks of a group have in common, made once."""

    def __init__(self) -> None:
        self._values: dict[object, Any] = {}

    def get(self, make: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Return ``make(*arguments, **options)``; the second time the value of the first."""
        key = (make, arguments, tuple(sorted(options.items())))
        if key not in self._values:
            self._values[key] = make(*arguments, **options)
        return self._values[key]


def open_samples(task: TrainingTask, shared: SharedResources) -> tuple[Dataset, tuple[Sample, ...]]:
    """Return a task's data and the images that it trains on.

    Raises:
        DatasetError: The data cannot be used, or there are fewer images than are asked for.
    """
    dataset = shared.get(open_dataset, task.data, skip_bad=task.skip_bad)
    samples = dataset.samples(task.split)
    if task.images is not None:
        whose = (task.name,) if task.data_order == "per_adapter" else ()
        samples = few_shot(samples, task.images, task.seed, *whose)
    return dataset, samples


@dataclasses.dataclass(slots=True)
class TrainingRun:
    """A task with its data at hand.

    Attributes:
        digest: Of all that decides what is published; tells where checkpoints are and whether the
            task has been done.
        steps: Training steps in all.
        batch_size: Images per step.
        progress: Who is told of progress; nobody until :meth:`report_to`.
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
        """What the batches are drawn with beside the seed."""
        if self.task.data_order == "per_adapter":
            return "train", self.task.name
        return "train-data", self.training_digest

    def plan(self, parameters: int) -> TrainingPlan:
        """Say what the task would do, which trains so many values.

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
        """Send progress there from now on."""
        self.progress = ProgressReporter(self.task.name, self.steps, self.batch_size, callback)

    def set_phase(self, phase: Phase) -> None:
        """Report that what comes before or after training begins."""
        self.progress.set_phase(phase, 0 if phase == "encode" else self.steps)

    def checkpoint_store(self) -> CheckpointStore:
        """Return where this very task keeps its checkpoints."""
        store = open_store(self.task.checkpoints)
        return CheckpointStore(store.with_prefix(f"{self.task.name}/{self.digest}"))

    def published_entry(self) -> CatalogEntry | None:
        """Find the version that this very task has made."""
        library = Library(open_store(self.task.library))
        for entry in reversed(library.versions(self.task.name)):
            if entry.card.recipe.get("task_digest") == self.digest:
                return entry
        return None

    def find_published(self) -> TaskResult | None:
        """Return the result if this very task has been published."""
        entry = self.published_entry()
        if entry is None:
            return None
        logger.info("%s: published as version %d already", self.task.name, entry.version)
        # A kill between publishing and clearing leaves checkpoints behind.
        self._clear_checkpoints()
        return self._result(entry, skipped=True, resumed_from_step=0)

    def publish(
        self, files: Mapping[str, bytes], card: AdapterCard, resumed_from_step: int
    ) -> TaskResult:
        """Publish what has been trained and let go of the checkpoints.

        Args:
            files: The adapter's.
            card: Holds :attr:`digest` under "task_digest" of its recipe.
            resumed_from_step: Step that training took up again at.
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
        """Return what to score on; nothing if there is no such split."""
        split = self.task.val_split
        return self.dataset.samples(split) if split in self.dataset.splits else ()

    def check_images(self, shared: SharedResources) -> None:
        """Find broken images and masks before the long work, not in the middle or after it.

        Raises:
            DatasetError: An image or mask is broken.
        """
        samples = (*self.samples, *self.validation_samples())
        shared.get(check_samples, self.dataset, samples)

    def _clear_checkpoints(self) -> None:
        """Remove what is not needed any more; the adapter is published, whatever is answered."""
        try:
            self.checkpoint_store().clear()
        except StoreError as error:
            logger.warning("checkpoints not removed: %s", error)

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
