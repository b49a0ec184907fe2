"""A segmenter adapter's work with its data and models at hand: what it is, and its end."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraseg import config as configuration
from loraseg.adapters import Adapter, adapter_files, load_adapter
from loraseg.backbones.clip import ClipEncoder, load_clip
from loraseg.backbones.device import best_device
from loraseg.data import DatasetFolder, Sample
from loraseg.fuse import fuse
from loraseg.library import BaseModel, Card, Centroid, TrainingSet
from loraseg.revision import code_revision
from loraseg.segment.base import SegmentationBase, load_base
from loraseg.tensor_types import ndarray
from loraseg.train.lora import Member, TrainedPairs
from loraseg.train.progress import Report
from loraseg.train.recipes import AdapterRecipe
from loraseg.train.score import mean_iou
from loraseg.train.segmentation import TrainingImages
from loraseg.train.unit import Loaded, Task, TaskResult, Unit, open_samples

__all__ = ["AdapterTask", "Work"]

# Part of every task digest: raise it when the same task would give other bytes than before.
TRAINING_FORMAT = 3
_EMBED_BATCH = 32
_KEPT_SCORES = 64

# Of the bare base, by all that decides it; the same for every adapter of a domain.
_base_scores: dict[tuple[object, ...], float] = {}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterTask(Task):
    """A segmenter's adapter to train.

    Attributes:
        base: The frozen segmenter, see :func:`loraseg.segment.base.load_base`.
        encoder: The CLIP whose space the centroid lies in.
        recipe: How to train.
    """

    encoder: str = "miniature"
    recipe: AdapterRecipe

    def places(self) -> tuple[str, ...]:
        """Return all addresses that a worker has to reach; names of models are none."""
        encoder = (self.encoder,) if Path(self.encoder).is_absolute() else ()
        return *Task.places(self), *encoder


@dataclasses.dataclass(slots=True)
class Work:
    """A task with its data and models at hand."""

    task: AdapterTask
    loaded: Loaded
    unit: Unit
    base: SegmentationBase
    encoder: ClipEncoder

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
        dataset, samples = open_samples(task, loaded)
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
        steps, batch_size = task.recipe.loop.steps, task.recipe.batch_size
        unit = Unit(task, dataset, samples, training_digest, digest, steps, batch_size)
        return cls(task, loaded, unit, base, encoder)

    def member(self, report: Report) -> Member:
        """Return this work as part of a training group; its steps are reported."""
        self.unit.report_to(report)
        return Member(recipe=self.task.recipe, slot=self.unit.slot(), watch=self.unit.pace)

    def finish(self, trained: TrainedPairs) -> TaskResult:
        """Score and publish what has been trained."""
        files = adapter_files(trained.pairs, base_name=self.base_name, base_digest=self.base.digest)
        adapter = load_adapter(files, name=self.task.name)
        self.unit.enter("evaluate")
        card = self.card(trained, self.score(adapter))
        return self.unit.publish(files, card, trained.loop.resumed_from_step)

    def training_images(self) -> TrainingImages:
        """Return the batches, drawn as ``data_order`` says."""
        return TrainingImages(
            self.unit.dataset,
            self.unit.samples,
            self.task.recipe.augment,
            first_resize=self.task.recipe.resize,
            seed=self.task.seed,
            keys=self.unit.keys,
        )

    def score(self, adapter: Adapter) -> dict[str, float]:
        """Return the mIoU of the bare base and with the adapter; empty without validation."""
        samples, dataset = self.unit.validation(), self.unit.dataset
        if not samples:
            return {}
        mix = fuse([adapter], [1.0])
        return {
            "miou_base": self._base_score(samples),
            "miou": mean_iou(self.base, dataset, samples, mix),
        }

    def _base_score(self, samples: tuple[Sample, ...]) -> float:
        dataset = self.unit.dataset
        data = self.loaded.once(dataset.digest, samples)
        key = (self.base.digest, self.base.device, torch.get_num_threads(), data)
        if key not in _base_scores:
            if len(_base_scores) >= _KEPT_SCORES:
                _base_scores.pop(next(iter(_base_scores)))
            _base_scores[key] = mean_iou(self.base, dataset, samples, None)
        return _base_scores[key]

    def card(self, trained: TrainedPairs, metrics: dict[str, float]) -> Card:
        """Return what the library is told about the adapter."""
        task, unit = self.task, self.unit
        recipe: dict[str, Any] = {
            **configuration.to_dict(task.recipe),
            "seed": task.seed,
            "task_digest": unit.digest,
            "skipped_batches": trained.loop.skipped_batches,
        }
        return Card(
            name=task.name,
            role="segmenter",
            base=BaseModel(self.base_name, self.base.digest),
            label_space=unit.dataset.label_space.names,
            centroids=(self.loaded.once(_centroid, self.encoder, unit.dataset, unit.samples),),
            recipe=recipe,
            training=TrainingSet(unit.training_digest, len(unit.samples)),
            metrics=metrics,
            code_revision=code_revision(),
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
