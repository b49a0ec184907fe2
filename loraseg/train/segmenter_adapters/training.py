"""Train LoRA adapters on a frozen CAT-Seg, one alone or several on the same batches (methods B)."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.targets.catseg import target_modules
from loraseg.errors import ConfigError, LorasegError
from loraseg.segment.open_vocabulary.base import SegmentationBase
from loraseg.tensor_types import Tensor, ndarray
from loraseg.train.core.checkpoint import CheckpointStore
from loraseg.train.core.loop import LoopResult, StepCallback, TrainingLoop
from loraseg.train.core.lora import TrainablePairs, apply_lora, freeze, init_pairs
from loraseg.train.segmenter_adapters.recipes import AdapterRecipe, group_signature
from loraseg.train.segmenter_adapters.samples import (
    ImageFeatures,
    Precision,
    TrainingImages,
    encode_image_features,
    encode_text,
    fixed_threads,
    has_labels,
    segmentation_loss,
)

__all__ = [
    "GroupMember",
    "TrainedPairs",
    "count_parameters",
    "image_encoder_is_frozen",
    "train_group",
    "train_lora",
]

logger = logging.getLogger(__name__)

_CLIP = "sem_seg_head.predictor.clip_model."


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedPairs:
    """The pairs on the CPU, by module name, and how training went."""

    pairs: dict[str, LoraPair]
    loop: LoopResult


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupMember:
    """One adapter of a group: its recipe, its checkpoints, and who is told of each step."""

    recipe: AdapterRecipe
    checkpoints: CheckpointStore | None = None
    on_step: StepCallback | None = None


def train_lora(
    base: SegmentationBase,
    images: TrainingImages,
    classes: Sequence[str],
    recipe: AdapterRecipe,
    *,
    checkpoints: CheckpointStore | None = None,
    on_step: StepCallback | None = None,
) -> TrainedPairs:
    """Train an adapter; the base is frozen and afterwards as it was, bit by bit.

    On the CPU the same arguments give the same bytes, however often the run is killed and resumed.

    Args:
        base: Where its model is (CPU or GPU) is where training happens.
        images: Augmented batches; their seed decides the initial pairs as well.
        classes: Class names by id.
        recipe: What to train and how.
        checkpoints: Checkpoints; None keeps none.
        on_step: Called after each step with (steps done, loss).

    Raises:
        ConfigError: The base's ``clip_attention_lora`` is not the recipe's.
        DatasetError: No pixel of any mask is labelled, or a file is broken.
        StageError: The loss is not finite, or no batch held a labelled pixel.
        StoreError: The checkpoints cannot be read.
    """
    member = GroupMember(recipe=recipe, checkpoints=checkpoints, on_step=on_step)
    (outcome,) = train_group(base, images, classes, [member])
    if isinstance(outcome, LorasegError):
        raise outcome
    return outcome


def train_group(
    base: SegmentationBase,
    images: TrainingImages,
    classes: Sequence[str],
    members: Sequence[GroupMember],
) -> list[TrainedPairs | LorasegError]:
    """Train several adapters step by step side by side, on the same batches.

    Each becomes what it would become alone, byte by byte on the CPU. What the rule leaves frozen
    before the first adapted layer is computed once a step for all of them: the same operation on
    the same input. An error of one member ends that member only; each resumes from a checkpoint of
    its own.

    Args:
        base: Where its model is (CPU or GPU) is where training happens.
        images: Augmented batches; their seed decides the initial pairs as well.
        classes: Class names by id.
        members: At least one; equal in
            :func:`~loraseg.train.segmenter_adapters.recipes.shared_part`.

    Returns:
        For each member its pairs, or the error that ended it.

    Raises:
        ConfigError: The base's ``clip_attention_lora`` is not the recipe's, or recipes differ in
            what a group shares.
        DatasetError: No pixel of any mask is labelled.
    """
    recipe, model = members[0].recipe, base.model
    _check_group(model.config.clip_attention_lora, members)
    images.require_labels()
    names = target_modules(model, recipe.targets)
    outcomes: dict[int, TrainedPairs | LorasegError] = {}
    running: dict[int, _AdapterTrainer] = {}
    with ExitStack() as stack:
        stack.enter_context(fixed_threads(recipe.threads))
        # Nothing in CAT-Seg but the pooling before class attention depends on the mode.
        stack.enter_context(freeze(model, training=recipe.pooled))
        inputs = _BatchInputs(base, images, base.tokenize(classes), recipe, names)
        for index, member in enumerate(members):
            try:
                running[index] = _AdapterTrainer(model, member, names, images.seed)
            except LorasegError as error:
                outcomes[index] = error
        first = min((run.loop.first_step for run in running.values()), default=0)
        for step in range(first, max(member.recipe.loop.steps for member in members)):
            takers = {i: run for i, run in running.items() if run.loop.has_step(step)}
            if not takers:
                continue
            for index, error in _step(step, inputs, takers).items():
                outcomes[index] = error
                del running[index]
        for index, run in running.items():
            try:
                outcomes[index] = TrainedPairs(run.pairs.detached(), run.loop.result())
            except LorasegError as error:
                outcomes[index] = error
    return [outcomes[index] for index in range(len(members))]


def _step(
    step: int, inputs: "_BatchInputs", active: Mapping[int, "_AdapterTrainer"]
) -> dict[int, LorasegError]:
    """Let all take one step; return the errors of those whom it ended."""
    try:
        inputs.load(step)
    except LorasegError as error:  # members that have finished keep what they have
        return dict.fromkeys(active, error)
    ended: dict[int, LorasegError] = {}
    for index, run in active.items():
        try:
            run.step(step, inputs)
        except LorasegError as error:
            ended[index] = error
    return ended


def image_encoder_is_frozen(model: nn.Module, rule: str) -> bool:
    """Return whether a rule leaves all of CLIP's image tower as it is."""
    return not any(name.startswith(_CLIP + "visual.") for name in target_modules(model, rule))


def count_parameters(model: nn.Module, recipe: AdapterRecipe) -> int:
    """Count what an adapter by this recipe would train; the model may be on the meta device."""
    layers = [model.get_submodule(name) for name in target_modules(model, recipe.targets)]
    return sum(recipe.rank * sum(layer.get_parameter("weight").shape) for layer in layers)


class _AdapterTrainer:
    """One adapter while it trains."""

    def __init__(
        self, model: nn.Module, member: GroupMember, names: Sequence[str], seed: int
    ) -> None:
        recipe = member.recipe
        self._model, self._mask_ignored = model, recipe.mask_ignored
        self.pairs: TrainablePairs = init_pairs(
            model, names, rank=recipe.rank, alpha=recipe.alpha, seed=seed
        )
        self.loop = TrainingLoop(
            self.pairs.parameters(),
            self.pairs.optimiser_groups(recipe.learning_rate, recipe.weight_decay),
            recipe.loop,
            checkpoints=member.checkpoints,
            on_step=member.on_step,
        )

    def step(self, step: int, inputs: "_BatchInputs") -> None:
        loss = None
        if inputs.labelled:
            with apply_lora(self._model, self.pairs):
                loss = inputs.loss(mask_ignored=self._mask_ignored)
        self.loop.step(step, loss)


class _BatchInputs:
    """The batch of one step, with what is frozen computed once for all who train on it."""

    def __init__(
        self,
        base: SegmentationBase,
        images: TrainingImages,
        tokens: Tensor,
        recipe: AdapterRecipe,
        names: Sequence[str],
    ) -> None:
        self._base, self._images, self._tokens = base, images, tokens
        self._batch_size = recipe.batch_size
        self._precision: Precision = recipe.loop.precision
        self._image_encoder_frozen = image_encoder_is_frozen(base.model, recipe.targets)
        self._image_features: ImageFeatures | None = None
        self._text_features: Tensor | None = None
        if not any(name.startswith(_CLIP + "transformer.") for name in names):
            with torch.no_grad():
                self._text_features = encode_text(base, tokens, self._precision)

    def load(self, step: int) -> None:
        """Load a step's batch; nobody's pairs act meanwhile."""
        self._pixels, self._labels = self._images.batch(step, self._batch_size)
        self.labelled = has_labels(self._labels)
        if self._image_encoder_frozen and self.labelled:
            with torch.no_grad():
                self._image_features = self._encode_images()

    def loss(self, *, mask_ignored: bool) -> Tensor:
        """Return the loss with the pairs that act now."""
        return segmentation_loss(
            self._base,
            encode_text(self._base, self._tokens, self._precision)
            if self._text_features is None
            else self._text_features,
            self._image_features or self._encode_images(),
            self._labels,
            mask_ignored=mask_ignored,
            precision=self._precision,
        )

    def _encode_images(self) -> ImageFeatures:
        pixels: ndarray = self._pixels
        return encode_image_features(self._base, pixels, self._precision)


def _check_group(clip_attention_lora: str, members: Sequence[GroupMember]) -> None:
    wanted = members[0].recipe.clip_attention_lora
    if clip_attention_lora != wanted:
        raise ConfigError(
            f"clip_attention_lora: the recipe says {wanted!r}, the base was loaded as "
            f"{clip_attention_lora!r}"
        )
    if len({group_signature(member.recipe) for member in members}) > 1:
        raise ConfigError(
            "recipes of one group may differ in name, rank, alpha, learning_rate, weight_decay, "
            "mask_ignored and loop (but not loop.precision); got others that differ"
        )
