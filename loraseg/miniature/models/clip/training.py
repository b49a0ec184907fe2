"""Pretrain the miniature CLIP: captions, presence of classes, domains, and labelled patches."""
# pyright: basic

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
from torch import Tensor, nn
from torch.nn import functional

from loraseg.miniature.models.clip.batches import ClipBatch, ScenePool, draw_batch
from loraseg.miniature.models.clip.model import build_clip, encode_dense, encode_text
from loraseg.miniature.models.weights_io import read_clip
from loraseg.miniature.world.canvas import CLASSES, class_id
from loraseg.miniature.world.captions import TEMPLATES, class_word, tokenizer
from loraseg.miniature.world.domains import DOMAINS
from loraseg.seeding import derive, numpy_generator
from loraseg.train.core.optimisation import OptimiserStep

__all__ = ["ClipTrainingConfig", "contrastive_loss", "multi_positive_loss", "train_clip"]

logger = logging.getLogger(__name__)

_PATCHES_PER_CLASS = 48
# Small things are rare among the patches and fuzzy at their edges.
_REGION_WEIGHTS = torch.ones(len(CLASSES))
_REGION_WEIGHTS[[class_id(name) for name in ("car", "bus", "person", "pole", "sign")]] = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTrainingConfig:
    """Settings of the pretraining; the card beside the weights tells how those came about.

    Attributes:
        seed: Of scenes, batches and the initial weights.
        steps: Optimiser steps; about 0.5 s each on one core.
        scenes: Rendered scenes a domain.
        learning_rate: Peak, after 60 steps of warm-up; cosine to a hundredth of it.
        weight_decay: On matrices only.
        log_every: Steps between two lines of the log.
        init: Weights of an interrupted run to go on from, with fresh optimiser state.
        first_step: The step to go on with; batches depend on the step alone.
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
            shown = " ".join(f"{value:.3f}" for value in totals / config.log_every)
            seconds = time.perf_counter() - started
            logger.info(
                "step %d, %.0f s: caption class dense region domain %s", step, seconds, shown
            )
            totals[:] = 0
        if step % 250 == 0:
            checkpoint(model, step)
    return model.eval()


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Return CLIP's loss of n matching unit vectors (n, d), both ways."""
    logits, target = scale * images @ texts.T, torch.arange(len(images))
    both = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    return both / 2


def multi_positive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Contrast (n, c) logits with any number of positives, along rows and along columns.

    Each softmax should spread evenly over the positives of its row or column; the value is the
    cross-entropy above that ideal, 0 at best. A row or column without positives adds nothing. A
    sigmoid loss for each entry learns nothing here: while all class texts are still alike, their
    common part takes the whole gradient.
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
    """Classify equally many patches of every class by the class prompts."""
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
