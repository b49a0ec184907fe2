"""Train a CAT-Seg itself further on a dataset folder, to become the base of a library."""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Literal

from loraseg import config as configuration
from loraseg.backbones.device import best_device
from loraseg.backbones.weights import resolve_weights
from loraseg.data import digest_samples, few_shot, open_dataset
from loraseg.data.transforms import AugmentConfig
from loraseg.errors import ConfigError
from loraseg.revision import code_revision
from loraseg.segment.open_vocabulary.base import SegmentationBase, load_base, save_base
from loraseg.segment.open_vocabulary.catseg.checkpoint import read_metadata
from loraseg.segment.open_vocabulary.catseg.trainable import freeze_clip, parameter_groups
from loraseg.storage import open_store
from loraseg.tensor_types import Tensor
from loraseg.train.core.checkpoint import CheckpointStore
from loraseg.train.core.loop import LoopConfig, LoopResult, run_loop
from loraseg.train.core.progress import ProgressCallback, ProgressReporter
from loraseg.train.core.task import task_digest
from loraseg.train.segmenter_adapters.samples import (
    TrainingImages,
    encode_image_features,
    encode_text,
    fixed_threads,
    has_labels,
    segmentation_loss,
)
from loraseg.train.segmenter_adapters.validation import mean_iou

__all__ = ["BaseRecipe", "BaseTrainingResult", "BaseTrainingTask", "train_base"]

logger = logging.getLogger(__name__)

# Part of every task digest: raise it when the same task would give other weights than before.
TRAINING_FORMAT = 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaseRecipe:
    """How the base is trained; the defaults are CAT-Seg's own (methods A.6) but for the steps.

    Attributes:
        learning_rate: At its peak, of aggregator and upsamplers.
        clip_multiplier: Share of it for CLIP's parameters.
        weight_decay: Of AdamW; norm layers and embeddings never decay.
        batch_size: Images per step.
        clip: What of CLIP trains: "attention" its q and v weights, "frozen" nothing.
        resize: (height, width) that image and mask are resized to before augmentation.
        augment: Crop, flip and colour jitter.
        mask_ignored: Leave ignored pixels out of the loss.
        pooled: Pool by two before class attention while training.
        loop: Steps, schedule, clipping and precision.
        threads: CPU threads while training. The last bits of a result depend on it.
    """

    learning_rate: float = 2e-4
    clip_multiplier: float = 0.01
    weight_decay: float = 1e-4
    batch_size: int = 4
    clip: Literal["attention", "frozen"] = "attention"
    resize: tuple[int, int] | None = None
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    mask_ignored: bool = False
    pooled: bool = True
    loop: LoopConfig = dataclasses.field(default_factory=lambda: LoopConfig(steps=80_000))
    threads: int = 1

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.batch_size < 1 or self.threads < 1:
            raise ConfigError(
                f"batch_size {self.batch_size}, threads {self.threads}: expected at least 1"
            )
        if not (self.learning_rate > 0 and self.clip_multiplier >= 0 and self.weight_decay >= 0):
            raise ConfigError(
                f"learning_rate {self.learning_rate}, clip_multiplier {self.clip_multiplier}, "
                f"weight_decay {self.weight_decay}: expected above 0, and at least 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaseTrainingTask:
    """What to train on what.

    Attributes:
        output: The ``.safetensors`` file to write.
        data: Dataset folder, a path or URI.
        base: The segmenter to start from.
        split: Split to train on.
        val_split: Split to score before and after; skipped if the folder has none of that name.
        images: Train on so many images, chosen by seed; None for all.
        checkpoints: Store URI for unfinished work; None keeps none.
        recipe: How to train.
        seed: Decides the choice of images and the batches.
        skip_bad: Leave out unusable images rather than fail.
    """

    output: str
    data: str
    base: str = "miniature"
    split: str = "train"
    val_split: str = "val"
    images: int | None = None
    checkpoints: str | None = None
    recipe: BaseRecipe = dataclasses.field(default_factory=BaseRecipe)
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        """Check the output's name.

        Raises:
            ConfigError: It would not be found again as one of our files.
        """
        if not self.output.endswith(".safetensors"):
            raise ConfigError(f"output: got {self.output!r}, expected a file x.safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaseTrainingResult:
    """The written file with the sha256 of its bytes, and mIoUs in [0, 1] if there was a split."""

    path: str
    digest: str
    metrics: dict[str, float]
    skipped: bool
    seconds: float


def train_base(
    task: BaseTrainingTask, on_progress: ProgressCallback = lambda progress: None
) -> BaseTrainingResult:
    """Train a base further and write it with its recipe, or find that this has been done.

    The file loads with :func:`loraseg.segment.open_vocabulary.base.load_base`.

    Args:
        task: What to do.
        on_progress: Called about once a step; should return quickly.

    Raises:
        ConfigError: The base cannot be found.
        DatasetError: The data cannot be used, or holds no labelled pixel.
        StageError: The loss is not finite, or there was nothing to learn from.
        StoreError: The checkpoints cannot be read.
    """
    started = time.monotonic()
    dataset = open_dataset(task.data, skip_bad=task.skip_bad)
    samples = dataset.samples(task.split)
    if task.images is not None:
        samples = few_shot(samples, task.images, task.seed)
    base = load_base(task.base)
    base.model.to(best_device())
    digest = task_digest(
        TRAINING_FORMAT,
        {
            "seed": task.seed,
            "recipe": task.recipe,
            "training_digest": digest_samples(dataset, samples),
            "base_digest": base.digest,
        },
    )
    if _is_finished(task.output, digest):
        return _read_result(task.output, skipped=True, started=started)
    images = TrainingImages(
        dataset,
        samples,
        task.recipe.augment,
        first_resize=task.recipe.resize,
        seed=task.seed,
        keys=("train-base",),
    )
    scored = dataset.samples(task.val_split) if task.val_split in dataset.splits else ()
    metrics = {"miou_base": mean_iou(base, dataset, scored, None)} if scored else {}
    slot = (
        CheckpointStore(open_store(task.checkpoints).with_prefix(digest))
        if task.checkpoints
        else None
    )
    pace = ProgressReporter("base", task.recipe.loop.steps, task.recipe.batch_size, on_progress)
    loop = _train(base, images, dataset.label_space.names, task.recipe, slot, pace)
    if scored:
        metrics["miou"] = mean_iou(base, dataset, scored, None)
    _save(task, base, digest, loop, metrics)
    if slot:
        slot.clear()
    return _read_result(task.output, skipped=False, started=started)


def _train(
    base: SegmentationBase,
    images: TrainingImages,
    classes: tuple[str, ...],
    recipe: BaseRecipe,
    slot: CheckpointStore | None,
    pace: ProgressReporter,
) -> LoopResult:
    images.require_labels()
    tokens = base.tokenize(classes)
    model = base.model
    freeze_clip(model, recipe.clip)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(
        model,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        clip_multiplier=recipe.clip_multiplier,
    )

    precision = recipe.loop.precision

    def loss_of(step: int) -> Tensor | None:
        pixels, labels = images.batch(step, recipe.batch_size)
        if not has_labels(labels):
            return None
        side = encode_image_features(base, pixels, precision)
        text = encode_text(base, tokens, precision)
        return segmentation_loss(
            base, text, side, labels, mask_ignored=recipe.mask_ignored, precision=precision
        )

    model.train(recipe.pooled)
    try:
        with fixed_threads(recipe.threads):
            return run_loop(
                parameters, groups, loss_of, recipe.loop, checkpoints=slot, on_step=pace
            )
    finally:
        model.eval()


def _save(
    task: BaseTrainingTask,
    base: SegmentationBase,
    digest: str,
    loop: LoopResult,
    metrics: dict[str, float],
) -> None:
    history = {
        "task_digest": digest,
        "base_digest": base.digest,
        "recipe": configuration.to_dict(task.recipe),
        "seed": task.seed,
        "skipped_batches": loop.skipped_batches,
        "metrics": metrics,
        "code_revision": code_revision(),
    }
    Path(task.output).parent.mkdir(parents=True, exist_ok=True)
    save_base(base, task.output, {"training": json.dumps(history, sort_keys=True)})


def _is_finished(output: str, digest: str) -> bool:
    """Whether the file is there and says that this very task made it."""
    if not Path(output).is_file():
        return False
    return json.loads(read_metadata(output).get("training", "{}")).get("task_digest") == digest


def _read_result(output: str, *, skipped: bool, started: float) -> BaseTrainingResult:
    history = json.loads(read_metadata(output)["training"])
    seconds = time.monotonic() - started
    logger.info("base %s: %s, %.1f s", output, "found" if skipped else "written", seconds)
    return BaseTrainingResult(
        path=output,
        digest=resolve_weights(output).digest,
        metrics=history["metrics"],
        skipped=skipped,
        seconds=seconds,
    )
