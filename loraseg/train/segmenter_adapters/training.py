"""Train LoRA adapters on a frozen segmenter, one alone or several on the same batches (SemLA)."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from loraseg.adapters.adapter import LoraPair
from loraseg.errors import ConfigError, LorasegError
from loraseg.segment.open_vocabulary.protocol import OpenVocabularyBase
from loraseg.tensor_types import Tensor, ndarray
from loraseg.train.core.checkpoint import CheckpointStore
from loraseg.train.core.loop import LoopResult, StepCallback, TrainingLoop
from loraseg.train.core.lora import TrainablePairs, apply_lora, freeze, init_pairs
from loraseg.train.core.threads import fixed_threads
from loraseg.train.segmenter_adapters.recipes import AdapterRecipe, group_signature
from loraseg.train.segmenter_adapters.samples import (
    Precision,
    TrainingImages,
    encode_image_features,
    encode_text,
    has_labels,
    segmentation_loss,
)

__all__ = [
    "GroupMember",
    "TrainedPairs",
    "count_parameters",
    "train_group",
    "train_lora",
]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedPairs:
    """Trained pairs by module name, on the CPU, and the result of the loop."""

    pairs: dict[str, LoraPair]
    loop: LoopResult


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupMember:
    """One adapter of a group.

    Attributes:
        recipe: What to train.
        checkpoints: Store of the checkpoints; None keeps none.
        on_step: Called after each step with (finished steps, loss).
    """

    recipe: AdapterRecipe
    checkpoints: CheckpointStore | None = None
    on_step: StepCallback | None = None


def train_lora(
    base: OpenVocabularyBase,
    images: TrainingImages,
    classes: Sequence[str],
    recipe: AdapterRecipe,
    *,
    checkpoints: CheckpointStore | None = None,
    on_step: StepCallback | None = None,
) -> TrainedPairs:
    """Train an adapter on a frozen base; the base's weights are unchanged afterwards, bit for bit.

    On the CPU equal arguments give equal bytes, however often the run is killed and resumed.

    Args:
        base: The segmenter; training runs on its device.
        images: Augmented batches; their seed also decides the initial pairs.
        classes: Class names by id.
        recipe: What to train.
        checkpoints: Store of the checkpoints; None keeps none.
        on_step: Called after each step with (finished steps, loss).

    Raises:
        ConfigError: The base's ``clip_attention_lora`` is not the recipe's.
        DatasetError: No pixel of any mask is labelled, or a file is broken.
        StageError: The loss is not finite, or no batch has a labelled pixel.
        StoreError: The checkpoints cannot be read.
    """
    member = GroupMember(recipe=recipe, checkpoints=checkpoints, on_step=on_step)
    (outcome,) = train_group(base, images, classes, [member])
    if isinstance(outcome, LorasegError):
        raise outcome
    return outcome


def train_group(
    base: OpenVocabularyBase,
    images: TrainingImages,
    classes: Sequence[str],
    members: Sequence[GroupMember],
) -> list[TrainedPairs | LorasegError]:
    """Train several adapters on the same batches, alternating at every step.

    Each gets the bytes that it would get alone, on the CPU. Encoders without adapted layers run
    once per step for all members. An error of one member ends that member only; each resumes from
    its own checkpoint.

    Args:
        base: The segmenter; training runs on its device.
        images: Augmented batches; their seed also decides the initial pairs.
        classes: Class names by id.
        members: At least one, with equal
            :func:`~loraseg.train.segmenter_adapters.recipes.group_signature`.

    Returns:
        The pairs or the error of each member.

    Raises:
        ConfigError: The base's ``clip_attention_lora`` is not the recipe's, or the recipes' group
            signatures differ.
        DatasetError: No pixel of any mask is labelled.
    """
    recipe, model = members[0].recipe, base.model
    _check_group(base.clip_attention_lora, members)
    images.require_labels()
    names = base.target_modules(recipe.targets)
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
            active = {i: run for i, run in running.items() if run.loop.has_step(step)}
            if not active:
                continue
            for index, error in _step(step, inputs, active).items():
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
    """Make one step of each active member; return the errors by member."""
    try:
        inputs.load(step)
    except LorasegError as error:  # Members that have finished keep their pairs.
        return dict.fromkeys(active, error)
    errors: dict[int, LorasegError] = {}
    for index, run in active.items():
        try:
            run.step(step, inputs)
        except LorasegError as error:
            errors[index] = error
    return errors


def count_parameters(base: OpenVocabularyBase, recipe: AdapterRecipe) -> int:
    """Return the number of values that an adapter trains; the model may be on the meta device."""
    linears = base.linears()
    layers = [linears[name] for name in base.target_modules(recipe.targets)]
    return sum(recipe.rank * sum(layer.weight.shape) for layer in layers)


class _AdapterTrainer:
    """The pairs of one member and their training loop."""

    def __init__(
        self, model: nn.Module, member: GroupMember, names: Sequence[str], seed: int
    ) -> None:
        recipe = member.recipe
        self._model, self._mask_ignored = model, recipe.mask_ignored
        self.pairs: TrainablePairs = init_pairs(
            model, names, rank=recipe.rank, alpha=recipe.alpha, seed=seed, method=recipe.init
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
    """The batch of a step, with the features of frozen encoders computed once for all members."""

    def __init__(
        self,
        base: OpenVocabularyBase,
        images: TrainingImages,
        tokens: Tensor,
        recipe: AdapterRecipe,
        names: Sequence[str],
    ) -> None:
        self._base, self._images, self._tokens = base, images, tokens
        self._batch_size = recipe.batch_size
        self._precision: Precision = recipe.loop.precision
        self._image_encoder_frozen = not base.adapts_images(names)
        self._image_features: Any = None
        self._text_features: Tensor | None = None
        if not base.adapts_text(names):
            with torch.no_grad():
                self._text_features = encode_text(base, tokens, self._precision)

    def load(self, step: int) -> None:
        """Load the batch of a step. No pairs may be applied to the model during the call."""
        self._pixels, self._labels = self._images.batch(step, self._batch_size)
        self.labelled = has_labels(self._labels)
        if self._image_encoder_frozen and self.labelled:
            with torch.no_grad():
                self._image_features = self._encode_images()

    def loss(self, *, mask_ignored: bool) -> Tensor:
        """Return the loss of the model with the pairs that are applied to it."""
        text, features = self._text_features, self._image_features
        return segmentation_loss(
            self._base,
            encode_text(self._base, self._tokens, self._precision) if text is None else text,
            self._encode_images() if features is None else features,
            self._labels,
            mask_ignored=mask_ignored,
            precision=self._precision,
        )

    def _encode_images(self) -> Any:
        pixels: ndarray = self._pixels
        return encode_image_features(self._base, pixels, self._precision)


def _check_group(clip_attention_lora: str, members: Sequence[GroupMember]) -> None:
    expected = members[0].recipe.clip_attention_lora
    if clip_attention_lora != expected:
        raise ConfigError(
            f"clip_attention_lora: the recipe says {expected!r}, the base was loaded as "
            f"{clip_attention_lora!r}"
        )
    if len({group_signature(member.recipe) for member in members}) > 1:
        raise ConfigError(
            "recipes of one group may differ in name, rank, alpha, learning_rate, weight_decay, "
            "mask_ignored and loop (but not loop.precision); got others that differ"
        )
