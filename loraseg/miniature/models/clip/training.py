"""Pretraining of the miniature CLIP on captions, class presence, domains and labelled patches."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import nn
from torch.nn import functional

from loraseg.miniature.models.clip.batches import ClipBatch, ScenePool, draw_batch
from loraseg.miniature.models.clip.model import build_clip, encode_dense, encode_text
from loraseg.miniature.models.weights_io import read_clip
from loraseg.miniature.world.canvas import CLASSES, class_id
from loraseg.miniature.world.captions import TEMPLATES, class_word, tokenizer
from loraseg.miniature.world.domains import DOMAINS
from loraseg.seeding import derive, numpy_generator
from loraseg.tensor_types import Float, Tensor
from loraseg.train.core.optimisation import OptimiserStep

__all__ = ["ClipTrainingConfig", "contrastive_loss", "multi_positive_loss", "train_clip"]

logger = logging.getLogger(__name__)

_PATCHES_PER_CLASS = 48
# Small objects are rare among the patches and have unclear edges.
_REGION_WEIGHTS = torch.ones(len(CLASSES))
_REGION_WEIGHTS[[class_id(name) for name in ("car", "bus", "person", "pole", "sign")]] = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTrainingConfig:
    """Settings of the pretraining; the model card describes the training of the shipped weights.

    Attributes:
        seed: Seed of scenes, batches and the initial weights.
        steps: Optimiser steps; about 0.5 s each on one core.
        scenes: Rendered scenes per domain.
        learning_rate: Peak learning rate, after 60 steps of warm-up; cosine decay to 1 %.
        weight_decay: Weight decay of matrices; vectors have none.
        log_every: Steps between log lines.
        init: Weights of an interrupted run to continue from, with new optimiser state.
        first_step: First step of a continued run; batches depend on the step only.
    """

    seed: int = 0
    steps: int = 2800
    scenes: int = 700
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    log_every: int = 50
    init: Path | None = None
    first_step: int = 1


class _LogitScales(nn.Module):
    """Learned inverse temperatures of the class, dense, region and domain terms."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scales = nn.Parameter(torch.full((4,), math.log(16.0)))

    def forward(self, index: int) -> Tensor:
        return self.log_scales[index].clamp(max=math.log(100)).exp()


def train_clip(
    config: ClipTrainingConfig,
    checkpoint: Callable[[nn.Module, int], None] = lambda model, step: None,
) -> nn.Module:
    """Train and return the model; ``checkpoint`` is called every 250 steps."""
    pool, words = ScenePool(config.scenes, config.seed), tokenizer()
    torch.manual_seed(derive(config.seed, "pretrain-clip", "weights"))
    model = build_clip(words.vocab_size) if config.init is None else read_clip(config.init).train()
    scales = _LogitScales()
    optimiser_step = _optimiser_step(model, scales, config)
    totals, started = np.zeros(5), time.perf_counter()
    for step in range(config.first_step, config.steps + 1):
        progress = (step - 1) / config.steps
        generator = numpy_generator(config.seed, "pretrain-clip", "batch", step)
        terms = _losses(model, scales, draw_batch(pool, progress, generator), words, generator)
        optimiser_step.update(step, torch.stack(terms).sum())
        totals += [term.item() for term in terms]
        if step % config.log_every == 0:
            means = " ".join(f"{value:.3f}" for value in totals / config.log_every)
            seconds = time.perf_counter() - started
            logger.info(
                "step %d, %.0f s: caption class dense region domain %s", step, seconds, means
            )
            totals[:] = 0
        if step % 250 == 0:
            checkpoint(model, step)
    return model.eval()


def contrastive_loss(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "n d"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return CLIP's symmetric contrastive loss of matching unit vectors."""
    logits, target = scale * images @ texts.T, torch.arange(len(images))
    both = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    return both / 2


def multi_positive_loss(
    logits: Float[Tensor, "n c"], positive: Float[Tensor, "n c"]
) -> Float[Tensor, ""]:
    """Return a contrastive loss with any number of positives per row and column.

    The target of each softmax, along rows and along columns, is uniform over its positives. The
    loss is the cross-entropy minus its minimum, so 0 at best; rows and columns without positives
    contribute 0. A sigmoid loss per entry does not learn here: as long as the class texts are
    nearly equal, the gradient is dominated by their common component.

    Args:
        logits: Scaled similarities.
        positive: 1 for matching entries, else 0.
    """

    def excess(dim: int) -> Tensor:
        count = positive.sum(dim, keepdim=True).clamp(min=1)
        target = positive / count
        return -(target * (logits.log_softmax(dim) + count.log())).sum(dim).mean()

    return (excess(1) + excess(0)) / 2


def _losses(
    model: Any, scales: _LogitScales, batch: ClipBatch, words: Any, generator: np.random.Generator
) -> list[Tensor]:
    prompts = _class_prompts(generator) + _domain_prompts(generator)
    ids = words([*batch.captions, *prompts])
    with torch.autocast("cpu", torch.bfloat16):
        whole, dense = encode_dense(model, batch.images, batch.offset)
        texts = encode_text(model, ids)
    whole, dense, texts = (functional.normalize(x.float(), dim=-1) for x in (whole, dense, texts))
    count = len(batch.captions)
    captions, classes, domains = texts.split([count, len(CLASSES), len(DOMAINS)])
    present = torch.from_numpy(batch.present).float()
    in_domain = functional.one_hot(torch.from_numpy(batch.domains), len(DOMAINS)).float()
    best = (dense @ classes.T).topk(min(3, dense.shape[1]), 1)[0].mean(1)
    scale = model.logit_scale.clamp(max=math.log(100)).exp()
    return [
        contrastive_loss(whole[:count], captions, scale),
        multi_positive_loss(scales(0) * whole @ classes.T, present),
        multi_positive_loss(scales(1) * best, present),
        _region_loss(dense.flatten(0, 1), classes, batch.patch_labels, scales(2), generator),
        multi_positive_loss(scales(3) * whole @ domains.T, in_domain),
    ]


def _region_loss(
    dense: Tensor, classes: Tensor, labels: ndarray, scale: Tensor, generator: np.random.Generator
) -> Tensor:
    """Return the loss of classifying the same number of patches per class by the class prompts."""
    labels = labels.reshape(-1)
    rows = np.concatenate(
        [
            generator.permutation(np.flatnonzero(labels == label))[:_PATCHES_PER_CLASS]
            for label in range(len(CLASSES))
        ]
    )
    if not len(rows):
        return dense.new_zeros(())
    target = torch.from_numpy(labels[rows].astype(np.int64))
    logits = scale * dense[torch.from_numpy(rows)] @ classes.T
    return functional.cross_entropy(logits, target, _REGION_WEIGHTS)


def _class_prompts(generator: np.random.Generator) -> list[str]:
    template = TEMPLATES[generator.integers(len(TEMPLATES))]
    return [template.format(class_word(name, generator)) for name in CLASSES]


def _domain_prompts(generator: np.random.Generator) -> list[str]:
    opening = ("a street ", "a photo ", "a scene ", "")[generator.integers(4)]
    return [
        opening + domain.phrases[generator.integers(len(domain.phrases))]
        for domain in DOMAINS.values()
    ]


def _optimiser_step(
    model: nn.Module, scales: nn.Module, config: ClipTrainingConfig
) -> OptimiserStep:
    parameters = [*model.parameters(), *scales.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]

    def rate(peak: float, step: int) -> float:
        warm = min(1.0, (step + 1 - config.first_step) / 60)
        progress = (step - 1) / config.steps
        return peak * warm * (0.495 * (1 + math.cos(math.pi * progress)) + 0.01)

    optimiser = torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.98))
    return OptimiserStep(optimiser, parameters, rate, clip_norm=1.0)
