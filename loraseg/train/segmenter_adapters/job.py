"""A segmenter adapter's work with its data and models at hand: what it is, and its end."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loraseg import config as configuration
from loraseg.adapters import Adapter, load_adapter, to_peft_files
from loraseg.backbones.clip import ClipEncoder, load_clip
from loraseg.backbones.device import best_device
from loraseg.data import Dataset, Sample, digest_samples
from loraseg.fuse import fuse
from loraseg.library import AdapterCard, BaseModelInfo, Centroid, TrainingSet
from loraseg.revision import code_revision
from loraseg.segment.open_vocabulary.base import SegmentationBase, load_base
from loraseg.tensor_types import ndarray
from loraseg.train.core.progress import ProgressCallback
from loraseg.train.core.task import (
    SharedResources,
    TaskResult,
    TrainingRun,
    TrainingTask,
    open_samples,
    task_digest,
)
from loraseg.train.segmenter_adapters.recipes import AdapterRecipe
from loraseg.train.segmenter_adapters.samples import TrainingImages
from loraseg.train.segmenter_adapters.training import GroupMember, TrainedPairs
from loraseg.train.segmenter_adapters.validation import mean_iou

__all__ = ["SegmenterAdapterJob", "SegmenterAdapterTask"]

# Part of every task digest: raise it when the same task would give other bytes than before.
TRAINING_FORMAT = 3
_EMBED_BATCH_SIZE = 32
_MAX_CACHED_SCORES = 64

# Of the bare base, by all that decides it; the same for every adapter of a domain.
_base_scores: dict[tuple[object, ...], float] = {}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterAdapterTask(TrainingTask):
    """A segmenter's adapter to train.

    Attributes:
        base: The frozen segmenter, see :func:`loraseg.segment.open_vocabulary.base.load_base`.
        encoder: The CLIP whose space the centroid lies in.
        recipe: How to train.
    """

    encoder: str = "miniature"
    recipe: AdapterRecipe

    def required_uris(self) -> tuple[str, ...]:
        """Return all addresses that a worker has to reach; names of models are none."""
        encoder = (self.encoder,) if Path(self.encoder).is_absolute() else ()
        return *TrainingTask.required_uris(self), *encoder


@dataclasses.dataclass(slots=True)
class SegmenterAdapterJob:
    """A task with its data and models at hand."""

    task: SegmenterAdapterTask
    shared: SharedResources
    training_run: TrainingRun
    base: SegmentationBase
    encoder: ClipEncoder

    @property
    def base_name(self) -> str:
        """The base's name without a folder, which would differ from machine to machine."""
        return self.base.name.rstrip("/").rpartition("/")[2]

    @classmethod
    def prepare(cls, task: SegmenterAdapterTask, shared: SharedResources) -> "SegmenterAdapterJob":
        """Look at the data and load the models.

        Raises:
            DatasetError: The data cannot be used.
            IntegrityError: The weights are damaged.
        """
        dataset, samples = open_samples(task, shared)
        base = shared.get(load_base, task.base, clip_attention_lora=task.recipe.clip_attention_lora)
        base.model.to(best_device())
        encoder = shared.get(load_clip, task.encoder)
        training_digest = shared.get(digest_samples, dataset, samples)
        # Where data and library are and how often work is saved change nothing; the number of
        # images is part of the training set's digest.
        digest = task_digest(
            TRAINING_FORMAT,
            {
                "name": task.name,
                "seed": task.seed,
                "data_order": task.data_order,
                "encoder": encoder.encoder_id,
                "recipe": _canonical_recipe(task.recipe),
                "training_digest": training_digest,
                "base_digest": base.digest,
            },
        )
        steps, batch_size = task.recipe.loop.steps, task.recipe.batch_size
        unit = TrainingRun(task, dataset, samples, training_digest, digest, steps, batch_size)
        return cls(task, shared, unit, base, encoder)

    def group_member(self, on_progress: ProgressCallback) -> GroupMember:
        """Return this work as part of a training group; its steps are reported."""
        self.training_run.set_progress_callback(on_progress)
        return GroupMember(
            recipe=self.task.recipe,
            checkpoints=self.training_run.checkpoint_store(),
            on_step=self.training_run.progress,
        )

    def score_and_publish(self, trained: TrainedPairs) -> TaskResult:
        """Score and publish what has been trained."""
        files = to_peft_files(trained.pairs, base_name=self.base_name, base_digest=self.base.digest)
        adapter = load_adapter(files, name=self.task.name)
        self.training_run.set_phase("evaluate")
        card = self.build_card(trained, self.score(adapter))
        return self.training_run.publish(files, card, trained.loop.resumed_from_step)

    def training_images(self) -> TrainingImages:
        """Return the batches, drawn as ``data_order`` says."""
        return TrainingImages(
            self.training_run.dataset,
            self.training_run.samples,
            self.task.recipe.augment,
            first_resize=self.task.recipe.resize,
            seed=self.task.seed,
            keys=self.training_run.stream_keys,
        )

    def score(self, adapter: Adapter) -> dict[str, float]:
        """Return the mIoU of the bare base and with the adapter; empty without validation."""
        samples, dataset = self.training_run.validation_samples(), self.training_run.dataset
        if not samples:
            return {}
        mix = fuse([adapter], [1.0])
        return {
            "miou_base": self._base_score(samples),
            "miou": mean_iou(self.base, dataset, samples, mix),
        }

    def _base_score(self, samples: tuple[Sample, ...]) -> float:
        dataset = self.training_run.dataset
        data = self.shared.get(digest_samples, dataset, samples)
        key = (self.base.digest, self.base.device, torch.get_num_threads(), data)
        if key not in _base_scores:
            if len(_base_scores) >= _MAX_CACHED_SCORES:
                _base_scores.pop(next(iter(_base_scores)))
            _base_scores[key] = mean_iou(self.base, dataset, samples, None)
        return _base_scores[key]

    def build_card(self, trained: TrainedPairs, metrics: dict[str, float]) -> AdapterCard:
        """Return what the library is told about the adapter."""
        task, unit = self.task, self.training_run
        recipe: dict[str, Any] = {
            **configuration.to_dict(task.recipe),
            "seed": task.seed,
            "task_digest": unit.digest,
            "skipped_batches": trained.loop.skipped_batches,
        }
        return AdapterCard(
            name=task.name,
            role="segmenter",
            base=BaseModelInfo(self.base_name, self.base.digest),
            label_space=unit.dataset.label_space.names,
            centroids=(self.shared.get(_centroid, self.encoder, unit.dataset, unit.samples),),
            recipe=recipe,
            training=TrainingSet(unit.training_digest, len(unit.samples)),
            metrics=metrics,
            code_revision=code_revision(),
        )


def _canonical_recipe(recipe: AdapterRecipe) -> AdapterRecipe:
    loop = dataclasses.replace(recipe.loop, checkpoint_every=1)
    return dataclasses.replace(recipe, loop=loop)


def _centroid(clip: ClipEncoder, dataset: Dataset, samples: tuple[Sample, ...]) -> Centroid:
    """Average the embeddings of the images trained on, none normalised (methods B.3)."""
    clip.model.to(best_device())
    rows: list[ndarray] = []
    for start in range(0, len(samples), _EMBED_BATCH_SIZE):
        batch = samples[start : start + _EMBED_BATCH_SIZE]
        images = [dataset.load_image(sample) for sample in batch]
        rows.append(np.asarray(clip.encode_images(images)))
    embeddings = np.concatenate(rows).astype(np.float64)
    return Centroid.from_embeddings(embeddings, encoder_id=clip.encoder_id, normalised=False)
