"""Fine-tune a CAT-Seg on a dataset, to use it as the base of a library."""

import dataclasses
import json
import logging
import time
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
from loraseg.storage import ObjectNotFoundError, open_store
from loraseg.tensor_types import Tensor
from loraseg.train.core.checkpoint import CheckpointStore
from loraseg.train.core.loop import LoopConfig, LoopResult, run_loop
from loraseg.train.core.progress import ProgressCallback, ProgressReporter
from loraseg.train.core.task_digest import task_digest
from loraseg.train.core.threads import fixed_threads
from loraseg.train.segmenter_adapters.samples import (
    TrainingImages,
    encode_image_features,
    encode_text,
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
    """How the base is trained; the defaults are those of CAT-Seg, except for the steps.

    Attributes:
        learning_rate: Peak rate of aggregator and upsamplers.
        clip_multiplier: Factor of the rate for CLIP's parameters.
        weight_decay: Weight decay of AdamW; norm layers and embeddings have none.
        batch_size: Images per step.
        clip: Parameters of CLIP that train: "attention" its q and v weights, "frozen" none.
        resize: (height, width) that image and mask are resized to before augmentation.
        augment: Crop, flip and colour jitter.
        mask_ignored: Leave ignored pixels out of the loss.
        pooled: Pool by two before class attention while training.
        loop: Steps, schedule, clipping and precision.
        threads: CPU threads while training; another number changes the last bits of the result.
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
    """A base to fine-tune.

    Attributes:
        output: Path or store URI of the ``.safetensors`` file to write.
        data: Dataset folder, a path or URI.
        base: The segmenter to start from.
        split: Split to train on.
        val_split: Split to score on before and after; not scored if the dataset has no such split.
        images: Number of training images, chosen by seed; None for all.
        checkpoints: Store URI of checkpoints; None keeps none.
        recipe: How to train.
        seed: Seed of the choice of images and the batches.
        skip_bad: Leave out unusable images instead of failing.
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
        """Check the name of the output.

        Raises:
            ConfigError: It does not end in ``.safetensors``.
        """
        if not self.output.endswith(".safetensors"):
            raise ConfigError(f"output: got {self.output!r}, expected a file x.safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaseTrainingResult:
    """The written file.

    Attributes:
        path: Path or URI, as in the task.
        digest: sha256 of its bytes, hex.
        metrics: "miou_base" and "miou" in [0, 1]; empty without a validation split.
        skipped: Whether an earlier run had written it.
        seconds: Wall-clock time of the run.
    """

    path: str
    digest: str
    metrics: dict[str, float]
    skipped: bool
    seconds: float


def train_base(
    task: BaseTrainingTask, on_progress: ProgressCallback = lambda progress: None
) -> BaseTrainingResult:
    """Fine-tune a base and write it; do nothing if the output holds the result of the same task.

    The file loads with :func:`loraseg.segment.open_vocabulary.base.load_base`.

    Args:
        task: What to train.
        on_progress: Called about once per step; should return quickly.

    Raises:
        ConfigError: The base does not exist.
        DatasetError: The data cannot be used, or has no labelled pixel.
        StageError: The loss is not finite, or no batch has a labelled pixel.
        StoreError: A store cannot be reached.
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
    if _written_by(task.output, digest):
        return _read_result(task.output, skipped=True, started=started)
    images = TrainingImages(
        dataset,
        samples,
        task.recipe.augment,
        first_resize=task.recipe.resize,
        seed=task.seed,
        keys=("train-base",),
    )
    validation = dataset.samples(task.val_split) if task.val_split in dataset.splits else ()
    metrics = {"miou_base": mean_iou(base, dataset, validation, None)} if validation else {}
    checkpoints = None
    if task.checkpoints:
        checkpoints = CheckpointStore(open_store(task.checkpoints).with_prefix(digest))
    steps, batch_size = task.recipe.loop.steps, task.recipe.batch_size
    progress = ProgressReporter("base", steps, batch_size, on_progress)
    loop = _train(base, images, dataset.label_space.names, task.recipe, checkpoints, progress)
    if validation:
        metrics["miou"] = mean_iou(base, dataset, validation, None)
    _save(task, base, digest, loop, metrics)
    if checkpoints:
        checkpoints.clear()
    return _read_result(task.output, skipped=False, started=started)


def _train(
    base: SegmentationBase,
    images: TrainingImages,
    classes: tuple[str, ...],
    recipe: BaseRecipe,
    checkpoints: CheckpointStore | None,
    progress: ProgressReporter,
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
        features = encode_image_features(base, pixels, precision)
        text = encode_text(base, tokens, precision)
        return segmentation_loss(
            base, text, features, labels, mask_ignored=recipe.mask_ignored, precision=precision
        )

    model.train(recipe.pooled)
    try:
        with fixed_threads(recipe.threads):
            return run_loop(
                parameters, groups, loss_of, recipe.loop, checkpoints=checkpoints, on_step=progress
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
    save_base(base, task.output, {"training": json.dumps(history, sort_keys=True)})


def _written_by(output: str, digest: str) -> bool:
    """Return whether the output exists and was written by the task of this digest."""
    try:
        path = resolve_weights(output).path
    except (ConfigError, ObjectNotFoundError):
        return False
    return json.loads(read_metadata(path).get("training", "{}")).get("task_digest") == digest


def _read_result(output: str, *, skipped: bool, started: float) -> BaseTrainingResult:
    weights = resolve_weights(output)
    history = json.loads(read_metadata(weights.path)["training"])
    seconds = time.monotonic() - started
    logger.info("base %s: %s, %.1f s", output, "exists" if skipped else "written", seconds)
    return BaseTrainingResult(
        path=output,
        digest=weights.digest,
        metrics=history["metrics"],
        skipped=skipped,
        seconds=seconds,
    )
