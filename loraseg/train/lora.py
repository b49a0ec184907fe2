# pyright: basic
"""Train one LoRA adapter on a frozen CAT-Seg with stock peft (methods B.1 and B.2)."""

import dataclasses
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.inject import targets
from loraseg.adapters.peft_io import pairs_of
from loraseg.compat import prepare_torchvision
from loraseg.errors import AdapterMismatchError, ConfigError
from loraseg.seeding import torch_generator
from loraseg.segment.base import SegmentationBase
from loraseg.tensor_types import Tensor
from loraseg.train.checkpoint import CheckpointSlot
from loraseg.train.loop import LoopResult, Watcher, run_loop
from loraseg.train.recipes import AdapterRecipe
from loraseg.train.segmentation import (
    TrainingImages,
    fixed_threads,
    segmentation_loss,
)

__all__ = ["TrainedPairs", "count_parameters", "injected", "train_lora"]


@dataclasses.dataclass(frozen=True, slots=True)
class TrainedPairs:
    """The pairs on the CPU, by module name, and how training went."""

    pairs: dict[str, LoraPair]
    loop: LoopResult


def train_lora(
    base: SegmentationBase,
    images: TrainingImages,
    classes: Sequence[str],
    recipe: AdapterRecipe,
    *,
    slot: CheckpointSlot | None = None,
    watch: Watcher | None = None,
) -> TrainedPairs:
    """Train an adapter; the base is frozen and afterwards as it was, bit by bit.

    On the CPU the same arguments give the same bytes, however often the run is killed and resumed.

    Args:
        base: Where its model is (CPU or GPU) is where training happens.
        images: Augmented batches; their seed decides the initial pairs as well.
        classes: Class names by id.
        recipe: What to train and how.
        slot: Checkpoints; None keeps none.
        watch: Called after each step with (steps done, loss).

    Raises:
        ConfigError: The base's ``clip_attention_lora`` is not the recipe's.
        DatasetError: No pixel of any mask is labelled, or a file is broken.
        StageError: The loss is not finite, or no batch held a labelled pixel.
        StoreError: The checkpoints cannot be read.
    """
    model, wanted = base.model, recipe.clip_attention_lora
    if model.config.clip_attention_lora != wanted:
        raise ConfigError(
            f"clip_attention_lora: the recipe says {wanted!r}, the base was loaded as "
            f"{model.config.clip_attention_lora!r}"
        )
    images.require_labels()
    tokens = base.tokenize(classes)
    with ExitStack() as stack:
        stack.enter_context(fixed_threads(recipe.threads))
        parameters = stack.enter_context(injected(model, recipe, images.seed))
        # Nothing in CAT-Seg but the pooling before class attention depends on the mode.
        model.train(recipe.pooled)

        def loss_of(step: int) -> Tensor | None:
            return segmentation_loss(
                base,
                tokens,
                images.batch(step, recipe.batch_size),
                mask_ignored=recipe.mask_ignored,
                precision=recipe.loop.precision,
            )

        groups = [
            {
                "params": list(parameters.values()),
                "lr": recipe.learning_rate,
                "weight_decay": recipe.weight_decay,
            }
        ]
        result = run_loop(parameters, groups, loss_of, recipe.loop, slot=slot, watch=watch)
        pairs = {
            module: LoraPair(pair.down.cpu(), pair.up.cpu(), pair.scale)
            for module, pair in pairs_of(model).items()
        }
    return TrainedPairs(pairs, result)


@contextmanager
def injected(
    model: nn.Module, recipe: AdapterRecipe, seed: int
) -> Generator[dict[str, nn.Parameter], None, None]:
    """Put fresh LoRA pairs into a model by peft and take them out again at the end.

    Yields the trainable parameters by name. A starts as in LoRA's reference (uniform within
    1 / sqrt(d_in)) from a stream of the module's own, B at zero, so the model is unchanged at
    first. Mode and ``requires_grad`` of the base are restored.

    Raises:
        AdapterMismatchError: The model holds LoRA pairs already.
    """
    prepare_torchvision()
    import peft

    if pairs_of(model):
        raise AdapterMismatchError("the model holds LoRA pairs already; expected the bare base")
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # pyright: ignore[reportArgumentType] - peft divides, it may be a fraction
        lora_dropout=0.0,
        bias="none",
        target_modules=list(targets(model, recipe.targets)),
    )
    was_training = model.training
    wanted_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    wrapped: Any = peft.LoraModel(model, config, "default")
    try:
        yield _initialised(model, seed)
    finally:
        wrapped.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted_grad[name])
        model.train(was_training)


def count_parameters(model: nn.Module, recipe: AdapterRecipe) -> int:
    """Count what an adapter by this recipe would train; the model may be on the meta device."""
    linears: list[Any] = [model.get_submodule(name) for name in targets(model, recipe.targets)]
    return sum(recipe.rank * (layer.in_features + layer.out_features) for layer in linears)


def _initialised(model: nn.Module, seed: int) -> dict[str, nn.Parameter]:
    trainable: dict[str, nn.Parameter] = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            layer: Any = module
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            start = torch.rand(down.shape, generator=torch_generator(seed, "lora", name))
            down.copy_((2 * start - 1) * down.shape[1] ** -0.5)
            up.zero_()
            trainable[f"{name}.lora_A"], trainable[f"{name}.lora_B"] = down, up
    return trainable
