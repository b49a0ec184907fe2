"""One adapter's work with its data and models at hand: what it is, whether it is done, its end."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from loraseg import config as configuration
from loraseg.adapters import Adapter, adapter_files, load_adapter
from loraseg.backbones.clip import ClipEncoder, load_clip
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
from loraseg.train.lora import Member, TrainedPairs
from loraseg.train.progress import Pace, Report
from loraseg.train.recipes import AdapterRecipe
from loraseg.train.score import mean_iou
from loraseg.train.segmentation import TrainingImages

__all__ = ["AdapterTask", "Loaded", "TaskResult", "Work"]

logger = logging.getLogger(__name__)

# Part of every task digest: raise it when the same task would give other bytes than before.
TRAINING_FORMAT = 3
_EMBED_BATCH = 32
_KEPT_SCORES = 64

T = TypeVar("T")
# Of the bare base, by all that decides it; the same for every adapter of a domain.
_base_scores: dict[tuple[object, ...], float] = {}


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
        data_order: "per_adapter" draws images and batches for each adapter's name. "per_dataset"
            draws them for the data alone: adapters of one dataset and seed see the same batches,
            so that they differ by their recipes only, and can be trained together.
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


class Loaded:
    """What the tasks of a group have in common, made once."""

    def __init__(self) -> None:
        self._kept: dict[object, Any] = {}

    def once(self, make: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Return ``make(*arguments, **options)``; the second time the value of the first."""
        key = (make, arguments, tuple(sorted(options.items())))
        if key not in self._kept:
            self._kept[key] = make(*arguments, **options)
        return self._kept[key]


@dataclasses.dataclass(slots=True)
class Work:
    """A task with its data and models at hand."""

    task: AdapterTask
    loaded: Loaded
    dataset: DatasetFolder
    samples: tuple[Sample, ...]
    base: SegmentationBase
    encoder: ClipEncoder
    training_digest: str
    digest: str
    started: float
    pace: Pace

    @property
    def base_name(self) -> str:
        """The base's name without a folder, which would differ from machine to machine."""
        return self.base.name.rstrip("/").rpartition("/")[2]

    @classmethod
    def prepare(cls, task: AdapterTask, loaded: Loaded) -> "Work":
        """Look at the data and load the models.

        Raises:
            DatasetError: The data cannot be used.
            IntegrityError: The weights are damaged.
        """
        started = time.monotonic()
        dataset = loaded.once(DatasetFolder.open, task.data, skip_bad=task.skip_bad)
        samples = dataset.samples(task.split)
        if task.images is not None:
            whose = (task.name,) if task.data_order == "per_adapter" else ()
            samples = few_shot(samples, task.images, task.seed, *whose)
        base = loaded.once(
            load_base, task.base, clip_attention_lora=task.recipe.clip_attention_lora
        )
        base.model.to(best_device())
        encoder = loaded.once(load_clip, task.encoder)
        training_digest = loaded.once(dataset.digest, samples)
        digest = configuration.digest(
            _TaskKey(
                format=TRAINING_FORMAT,
                name=task.name,
                seed=task.seed,
                data_order=task.data_order,
                encoder=encoder.encoder_id,
                recipe=_that_matters(task.recipe),
                training_digest=training_digest,
                base_digest=base.digest,
            )
        )
        loop = task.recipe.loop
        pace = Pace(task.name, loop.steps, task.recipe.batch_size, lambda progress: None)
        return cls(
            task, loaded, dataset, samples, base, encoder, training_digest, digest, started, pace
        )

    def member(self, report: Report) -> Member:
        """Return this work as part of a training group; its steps are reported."""
        steps = self.task.recipe.loop.steps
        self.pace = Pace(self.task.name, steps, self.task.recipe.batch_size, report)
        return Member(recipe=self.task.recipe, slot=self.slot(), watch=self.pace)

    def found_done(self) -> TaskResult | None:
        """Return the result if this very task has been published."""
        entry = self.published()
        if entry is None:
            return None
        logger.info("%s: published as version %d already", self.task.name, entry.version)
        _clear(self.slot())  # a kill between publishing and clearing leaves checkpoints behind
        return _result(self, entry, skipped=True, resumed=0, started=self.started)

    def finish(self, trained: TrainedPairs) -> TaskResult:
        """Score and publish what has been trained."""
        task, steps = self.task, self.task.recipe.loop.steps
        files = adapter_files(trained.pairs, base_name=self.base_name, base_digest=self.base.digest)
        adapter = load_adapter(files, name=task.name)
        self.pace.enter("evaluate", steps)
        metrics = self.score(adapter)
        self.pace.enter("publish", steps)
        library = Library(open_store(task.library))
        entry = library.publish(task.name, files, self.card(trained, metrics))
        _clear(self.slot())
        resumed = trained.loop.resumed_from_step
        result = _result(self, entry, skipped=False, resumed=resumed, started=self.started)
        logger.info("%s: published version %d, %.1f s", task.name, entry.version, result.seconds)
        return result

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
        """Return the batches, drawn as ``data_order`` says."""
        return TrainingImages(
            self.dataset,
            self.samples,
            self.task.recipe.augment,
            first_resize=self.task.recipe.resize,
            seed=self.task.seed,
            keys=("train", self.task.name)
            if self.task.data_order == "per_adapter"
            else ("train-data", self.training_digest),
        )

    def check_images(self) -> None:
        """Find broken images and masks before the long work, not in the middle or after it.

        Raises:
            DatasetError: An image or mask is broken.
        """
        self.loaded.once(self.dataset.check, (*self.samples, *self.validation()))

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
            "miou_base": self._base_score(samples),
            "miou": mean_iou(self.base, self.dataset, samples, mix),
        }

    def _base_score(self, samples: tuple[Sample, ...]) -> float:
        data = self.loaded.once(self.dataset.digest, samples)
        key = (self.base.digest, self.base.device, torch.get_num_threads(), data)
        if key not in _base_scores:
            if len(_base_scores) >= _KEPT_SCORES:
                _base_scores.pop(next(iter(_base_scores)))
            _base_scores[key] = mean_iou(self.base, self.dataset, samples, None)
        return _base_scores[key]

    def card(self, trained: TrainedPairs, metrics: dict[str, float]) -> Card:
        """Return what the library is told about the adapter."""
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
            centroids=(self.loaded.once(_centroid, self.encoder, self.dataset, self.samples),),
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


def _result(work: Work, entry: Entry, *, skipped: bool, resumed: int, started: float) -> TaskResult:
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
    data_order: str
    encoder: str
    recipe: AdapterRecipe
    training_digest: str
    base_digest: str


def _that_matters(recipe: AdapterRecipe) -> AdapterRecipe:
    loop = dataclasses.replace(recipe.loop, checkpoint_every=1)
    return dataclasses.replace(recipe, loop=loop)


def _centroid(clip: ClipEncoder, dataset: DatasetFolder, samples: tuple[Sample, ...]) -> Centroid:
    """Average the embeddings of the images trained on, none normalised (methods B.3)."""
    clip.model.to(best_device())
    rows: list[ndarray] = []
    for start in range(0, len(samples), _EMBED_BATCH):
        images = [dataset.load(sample)[0] for sample in samples[start : start + _EMBED_BATCH]]
        rows.append(np.asarray(clip.encode_images(images)))
    embeddings = np.concatenate(rows).astype(np.float64)
    return Centroid.from_embeddings(embeddings, encoder_id=clip.encoder_id, normalised=False)
