"""The job that trains, scores and publishes segmenter adapters."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loraseg import config as configuration
from loraseg.adapters import Adapter, load_adapter, to_peft_files
from loraseg.backbones.clip import ClipEncoder, load_clip
from loraseg.backbones.device import best_device
from loraseg.data import Dataset, Sample, digest_samples
from loraseg.errors import LorasegError
from loraseg.fuse import fuse
from loraseg.library import AdapterCard, BaseModelInfo, Centroid, TrainingSet
from loraseg.lru_cache import LruCache
from loraseg.revision import code_revision
from loraseg.segment.open_vocabulary.base import SegmentationBase, load_base
from loraseg.tensor_types import ndarray
from loraseg.train.core.progress import ProgressCallback
from loraseg.train.core.task import (
    SharedResources,
    TaskResult,
    TrainingPlan,
    TrainingRun,
    open_samples,
)
from loraseg.train.core.task_digest import task_digest
from loraseg.train.segmenter_adapters.recipes import AdapterRecipe
from loraseg.train.segmenter_adapters.samples import TrainingImages
from loraseg.train.segmenter_adapters.task import SegmenterAdapterTask
from loraseg.train.segmenter_adapters.training import (
    GroupMember,
    TrainedPairs,
    count_parameters,
    train_group,
)
from loraseg.train.segmenter_adapters.validation import mean_iou

__all__ = ["SegmenterAdapterJob", "run_group"]

# Part of every task digest: raise it when the same task would give other bytes than before.
TRAINING_FORMAT = 3
_EMBED_BATCH_SIZE = 32

# mIoU of the bare base, shared by all adapters of a domain.
_base_scores: LruCache[tuple[object, ...], float] = LruCache(64)


@dataclasses.dataclass(slots=True)
class SegmenterAdapterJob:
    """A segmenter task with its dataset, base and encoder."""

    task: SegmenterAdapterTask
    shared: SharedResources
    training_run: TrainingRun
    base: SegmentationBase
    encoder: ClipEncoder

    @property
    def base_name(self) -> str:
        """The base's name without its folder, which differs between machines."""
        return self.base.name.rstrip("/").rpartition("/")[2]

    @classmethod
    def prepare(cls, task: SegmenterAdapterTask, shared: SharedResources) -> "SegmenterAdapterJob":
        """Open the data and load the models.

        Raises:
            DatasetError: The data cannot be used.
            IntegrityError: The weights are damaged.
        """
        dataset, samples = open_samples(task, shared)
        base = shared.get(load_base, task.base, clip_attention_lora=task.recipe.clip_attention_lora)
        base.model.to(best_device())
        encoder = shared.get(load_clip, task.encoder)
        training_digest = shared.get(digest_samples, dataset, samples)
        # URIs and the checkpoint interval change nothing about the result; the number of images
        # is part of the training set's digest.
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
        run = TrainingRun(task, dataset, samples, training_digest, digest, steps, batch_size)
        return cls(task, shared, run, base, encoder)

    def plan(self) -> TrainingPlan:
        """Check the data and describe what :meth:`run` would do.

        Raises:
            DatasetError: An image or mask is broken.
            StoreError: The library cannot be read.
        """
        self.training_run.check_images(self.shared)
        return self.training_run.plan(count_parameters(self.base, self.task.recipe))

    def run(self, on_progress: ProgressCallback) -> TaskResult:
        """Train, score and publish; return the published version if the task is done already.

        Raises:
            DatasetError: A file is broken, or no pixel is labelled.
            StageError: The loss is not finite, or no batch has a labelled pixel.
            StoreError: A store cannot be reached.
        """
        (outcome,) = run_group([self], on_progress)
        if isinstance(outcome, LorasegError):
            raise outcome
        return outcome

    def group_member(self, on_progress: ProgressCallback) -> GroupMember:
        """Return this job's recipe, checkpoints and progress reports for :func:`train_group`."""
        self.training_run.set_progress_callback(on_progress)
        return GroupMember(
            recipe=self.task.recipe,
            checkpoints=self.training_run.checkpoint_store(),
            on_step=self.training_run.progress,
        )

    def score_and_publish(self, trained: TrainedPairs) -> TaskResult:
        """Score trained pairs on the validation split and publish them.

        Raises:
            DatasetError: A validation image is broken.
            StoreError: The library cannot be written.
        """
        files = to_peft_files(trained.pairs, base_name=self.base_name, base_digest=self.base.digest)
        adapter = load_adapter(files, name=self.task.name)
        self.training_run.set_phase("evaluate")
        card = self.build_card(trained, self.score(adapter))
        return self.training_run.publish(files, card, trained.loop.resumed_from_step)

    def training_images(self) -> TrainingImages:
        """Return the training batches, drawn as the task's ``data_order`` says."""
        return TrainingImages(
            self.training_run.dataset,
            self.training_run.samples,
            self.task.recipe.augment,
            first_resize=self.task.recipe.resize,
            seed=self.task.seed,
            keys=self.training_run.stream_keys,
        )

    def score(self, adapter: Adapter) -> dict[str, float]:
        """Return the mIoU in [0, 1] of the bare base and with the adapter; empty without a split.

        Raises:
            DatasetError: A validation image is broken.
        """
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
        data_digest = self.shared.get(digest_samples, dataset, samples)
        key = (self.base.digest, self.base.device, torch.get_num_threads(), data_digest)
        return _base_scores.get_or_create(key, lambda: mean_iou(self.base, dataset, samples, None))

    def build_card(self, trained: TrainedPairs, metrics: dict[str, float]) -> AdapterCard:
        """Return the card to publish with the adapter."""
        task, run = self.task, self.training_run
        recipe: dict[str, Any] = {
            **configuration.to_dict(task.recipe),
            "seed": task.seed,
            "task_digest": run.digest,
            "skipped_batches": trained.loop.skipped_batches,
        }
        return AdapterCard(
            name=task.name,
            role=task.role,
            base=BaseModelInfo(self.base_name, self.base.digest),
            label_space=run.dataset.label_space.names,
            centroids=(self.shared.get(_centroid, self.encoder, run.dataset, run.samples),),
            recipe=recipe,
            training=TrainingSet(run.training_digest, len(run.samples)),
            metrics=metrics,
            code_revision=code_revision(),
        )


def run_group(
    jobs: Sequence[SegmenterAdapterJob], on_progress: ProgressCallback
) -> list[TaskResult | LorasegError]:
    """Run jobs of one group key, training all of them on the same batches.

    Args:
        jobs: Jobs that share one :class:`~loraseg.train.core.task.SharedResources`.
        on_progress: Called about once per step of each job.

    Returns:
        The result or the error of each job. An error ends the job that raised it only.
    """
    outcomes: dict[int, TaskResult | LorasegError] = {}
    members: dict[int, GroupMember] = {}
    for index, job in enumerate(jobs):
        try:
            published = job.training_run.find_published()
            if published is None:
                job.training_run.check_images(job.shared)
                members[index] = job.group_member(on_progress)
            else:
                outcomes[index] = published
        except LorasegError as error:
            outcomes[index] = error
    trained = _train([jobs[index] for index in members], list(members.values()))
    for index, pairs in zip(members, trained, strict=True):
        try:
            is_error = isinstance(pairs, LorasegError)
            outcomes[index] = pairs if is_error else jobs[index].score_and_publish(pairs)
        except LorasegError as error:
            outcomes[index] = error
    return [outcomes[index] for index in range(len(jobs))]


def _train(
    jobs: Sequence[SegmenterAdapterJob], members: Sequence[GroupMember]
) -> list[TrainedPairs | LorasegError]:
    if not jobs:
        return []
    for job in jobs:
        job.training_run.progress.restart_throughput()
    first = jobs[0]
    try:
        classes = first.training_run.dataset.label_space.names
        return train_group(first.base, first.training_images(), classes, members)
    except LorasegError as error:
        return [error] * len(jobs)


def _canonical_recipe(recipe: AdapterRecipe) -> AdapterRecipe:
    loop = dataclasses.replace(recipe.loop, checkpoint_every=1)
    return dataclasses.replace(recipe, loop=loop)


def _centroid(clip: ClipEncoder, dataset: Dataset, samples: tuple[Sample, ...]) -> Centroid:
    """Average the CLIP embeddings of the training images, not normalised, as SemLA's index does."""
    clip.model.to(best_device())
    batches: list[ndarray] = []
    for start in range(0, len(samples), _EMBED_BATCH_SIZE):
        batch = samples[start : start + _EMBED_BATCH_SIZE]
        images = [dataset.load_image(sample) for sample in batch]
        batches.append(np.asarray(clip.encode_images(images)))
    embeddings = np.concatenate(batches).astype(np.float64)
    return Centroid.from_embeddings(embeddings, encoder_id=clip.encoder_id, normalised=False)
