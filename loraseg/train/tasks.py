"""One adapter as one unit of work: plan it, run it, resume it, publish it. Safe to run twice."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from loraseg import config as configuration
from loraseg.adapters import Adapter, adapter_files, load_adapter
from loraseg.backbones.clip import load_clip
from loraseg.backbones.device import best_device
from loraseg.data import DatasetFolder, Sample, few_shot
from loraseg.errors import ConfigError, IntegrityError, StoreError
from loraseg.fuse import fuse
from loraseg.library import BaseModel, Card, Centroid, Entry, Library, TrainingSet
from loraseg.library.card import check_name
from loraseg.revision import code_revision
from loraseg.segment.base import SegmentationBase, load_base
from loraseg.storage import open_store
from loraseg.tensor_types import ndarray
from loraseg.train.checkpoint import CheckpointSlot
from loraseg.train.lora import TrainedPairs, count_parameters, train_lora
from loraseg.train.progress import Pace, Progress, Report
from loraseg.train.recipes import AdapterRecipe
from loraseg.train.score import mean_iou
from loraseg.train.segmentation import TrainingImages

__all__ = ["AdapterTask", "Progress", "Report", "TaskPlan", "TaskResult", "plan", "run_task"]

logger = logging.getLogger(__name__)

# Part of every task digest: raise it when the same task would give other bytes than before.
TRAINING_FORMAT = 1
_EMBED_BATCH = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTask:
    """What to train on what, and where the result goes.

    Attributes:
        name: The adapter's name in the library.
        data: Dataset folder, a path or URI.
        split: Split to train on.
        val_split: Split to score before and after; skipped if the folder has none of that name.
        images: Train on so many images, chosen by seed; None for all.
        base: The frozen segmenter, see :func:`loraseg.segment.base.load_base`.
        encoder: The CLIP whose space the centroid lies in.
        recipe: How to train.
        seed: Decides the choice of images, the initial pairs and the batches.
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
    encoder: str = "miniature"
    recipe: AdapterRecipe
    seed: int = 0
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TaskPlan:
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
        metrics: In [0, 1]; empty without a validation split.
        left_out: Unusable files that ``skip_bad`` left out, each with its reason.
    """

    name: str
    digest: str
    version: int
    metrics: dict[str, float]
    skipped: bool
    resumed_from_step: int
    seconds: float
    current: bool = True
    left_out: tuple[str, ...] = ()


def plan(task: AdapterTask) -> TaskPlan:
    """Look at data, base and library and say what :func:`run_task` would do.

    Raises:
        DatasetError: The data cannot be used.
        IntegrityError: The base's weights are damaged.
        StoreError: The library cannot be read.
    """
    work = _Work.prepare(task)
    work.check_images()
    return TaskPlan(
        name=task.name,
        images=len(work.samples),
        parameters=count_parameters(work.base.model, task.recipe),
        steps=task.recipe.loop.steps,
        digest=work.digest,
        published=work.published() is not None,
    )


def run_task(task: AdapterTask, report: Report = lambda progress: None) -> TaskResult:
    """Train, score and publish one adapter, or find that this has been done.

    Killed at any point and run again, it goes on from its last checkpoint and publishes the same
    bytes. Done before with the same digest, it does nothing.

    Args:
        task: The unit of work.
        report: Called about once a step; should return quickly.

    Raises:
        DatasetError: The data cannot be used, or holds no labelled pixel.
        StageError: The loss is not finite, or there was nothing to learn from.
        StoreError: A store cannot be reached.
        IntegrityError: The base's weights or the library are damaged.
    """
    started = time.monotonic()
    work = _Work.prepare(task)
    entry = work.published()
    if entry is not None:
        logger.info("%s: published as version %d already", task.name, entry.version)
        _clear(work.slot())  # a kill between publishing and clearing leaves checkpoints behind
        return _result(work, entry, skipped=True, resumed=0, started=started)
    steps = task.recipe.loop.steps
    pace = Pace(task.name, steps, task.recipe.batch_size, report)
    slot = work.slot()
    work.check_images()
    pace.restart()
    trained = train_lora(
        work.base,
        work.training_images(),
        work.dataset.label_space.names,
        task.recipe,
        slot=slot,
        watch=pace,
    )
    files = adapter_files(trained.pairs, base_name=work.base_name, base_digest=work.base.digest)
    adapter = load_adapter(files, name=task.name)
    pace.enter("evaluate", steps)
    metrics = work.score(adapter)
    pace.enter("publish", steps)
    entry = Library(open_store(task.library)).publish(task.name, files, work.card(trained, metrics))
    _clear(slot)
    resumed = trained.loop.resumed_from_step
    result = _result(work, entry, skipped=False, resumed=resumed, started=started)
    logger.info("%s: published version %d after %.1f s", task.name, entry.version, result.seconds)
    return result


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """A task with its data and base at hand."""

    task: AdapterTask
    dataset: DatasetFolder
    samples: tuple[Sample, ...]
    base: SegmentationBase
    training_digest: str
    digest: str

    @property
    def base_name(self) -> str:
        """The base's name without a folder, which would differ from machine to machine."""
        return self.base.name.rstrip("/").rpartition("/")[2]

    @classmethod
    def prepare(cls, task: AdapterTask) -> "_Work":
        dataset = DatasetFolder.open(task.data, skip_bad=task.skip_bad)
        samples = dataset.samples(task.split)
        if task.images is not None:
            samples = few_shot(samples, task.images, task.seed, task.name)
        base = load_base(task.base, clip_attention_lora=task.recipe.clip_attention_lora)
        base.model.to(best_device())
        training_digest = dataset.digest(samples)
        digest = configuration.digest(
            _TaskKey(
                format=TRAINING_FORMAT,
                name=task.name,
                seed=task.seed,
                encoder=load_clip(task.encoder).encoder_id,
                recipe=_that_matters(task.recipe),
                training_digest=training_digest,
                base_digest=base.digest,
            )
        )
        return cls(task, dataset, samples, base, training_digest, digest)

    def slot(self) -> CheckpointSlot:
        """Return where this very task keeps its checkpoints."""
        store = open_store(self.task.checkpoints)
        return CheckpointSlot(store.sub(f"{self.task.name}/{self.digest}"))

    def published(self) -> Entry | None:
        """Find the version that this very task has made."""
        library = Library(open_store(self.task.library))
        for entry in reversed(library.versions(self.task.name)):
            if entry.card.recipe.get("task_digest") == self.digest:
                return entry
        return None

    def training_images(self) -> TrainingImages:
        return TrainingImages(
            self.dataset,
            self.samples,
            self.task.recipe.augment,
            first_resize=self.task.recipe.resize,
            seed=self.task.seed,
            keys=("train", self.task.name),
        )

    def check_images(self) -> None:
        """Find broken images and masks before the long work, not in the middle or after it.

        Raises:
            DatasetError: An image or mask is broken.
        """
        self.dataset.check((*self.samples, *self.validation()))

    def validation(self) -> tuple[Sample, ...]:
        """Return what to score on; nothing if there is no such split."""
        split = self.task.val_split
        return self.dataset.samples(split) if split in self.dataset.splits else ()

    def score(self, adapter: Adapter) -> dict[str, float]:
        """Return the mIoU of the bare base and with the adapter; empty without validation."""
        samples = self.validation()
        if not samples:
            return {}
        mix = fuse([adapter], [1.0])
        return {
            "miou_base": mean_iou(self.base, self.dataset, samples, None),
            "miou": mean_iou(self.base, self.dataset, samples, mix),
        }

    def card(self, trained: TrainedPairs, metrics: dict[str, float]) -> Card:
        task = self.task
        recipe: dict[str, Any] = {
            **configuration.to_dict(task.recipe),
            "seed": task.seed,
            "task_digest": self.digest,
            "skipped_batches": trained.loop.skipped_batches,
        }
        return Card(
            name=task.name,
            role="segmenter",
            base=BaseModel(self.base_name, self.base.digest),
            label_space=self.dataset.label_space.names,
            centroids=(_centroid(task.encoder, self.dataset, self.samples),),
            recipe=recipe,
            training=TrainingSet(self.training_digest, len(self.samples)),
            metrics=metrics,
            code_revision=code_revision(),
        )


def _clear(slot: CheckpointSlot) -> None:
    """Remove what is not needed any more; the adapter is published, whatever the store answers."""
    try:
        slot.clear()
    except StoreError as error:
        logger.warning("checkpoints not removed: %s", error)


def _result(
    work: _Work, entry: Entry, *, skipped: bool, resumed: int, started: float
) -> TaskResult:
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
        resumed_from_step=resumed,
        seconds=time.monotonic() - started,
        current=entry.current,
        left_out=tuple(f"{path}: {reason}" for path, reason in work.dataset.skipped),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _TaskKey:
    """What decides the published bytes: not where things lie, nor how often work is saved.

    The number of images is in the training set's digest.
    """

    format: int
    name: str
    seed: int
    encoder: str
    recipe: AdapterRecipe
    training_digest: str
    base_digest: str


def _that_matters(recipe: AdapterRecipe) -> AdapterRecipe:
    loop = dataclasses.replace(recipe.loop, checkpoint_every=1)
    return dataclasses.replace(recipe, loop=loop)


def _centroid(encoder: str, dataset: DatasetFolder, samples: Sequence[Sample]) -> Centroid:
    """Average the embeddings of the images trained on, none normalised (methods B.3)."""
    clip = load_clip(encoder)
    clip.model.to(best_device())
    rows: list[ndarray] = []
    for start in range(0, len(samples), _EMBED_BATCH):
        images = [dataset.load(sample)[0] for sample in samples[start : start + _EMBED_BATCH]]
        rows.append(np.asarray(clip.encode_images(images)))
    embeddings = np.concatenate(rows).astype(np.float64)
    return Centroid.from_embeddings(embeddings, encoder_id=clip.encoder_id, normalised=False)
