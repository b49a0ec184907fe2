"""Training of the miniature CAT-Seg on four domains with one class held out."""

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from loraseg.data import IGNORE
from loraseg.miniature.models.clip.model import CLIP_CONFIG, normalise
from loraseg.miniature.world.canvas import CLASSES, class_id
from loraseg.miniature.world.captions import PROMPT, class_word, tokenizer
from loraseg.miniature.world.domains import BASE_DOMAINS
from loraseg.miniature.world.render import render
from loraseg.seeding import derive, numpy_generator
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.from_clip import catseg_from_clip
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.segment.open_vocabulary.catseg.trainable import freeze_clip, parameter_groups
from loraseg.segment.open_vocabulary.losses import catseg_bce
from loraseg.train.core.optimisation import OptimiserStep

__all__ = ["HELD_OUT", "CatsegTrainingConfig", "catseg_config", "train_catseg"]

logger = logging.getLogger(__name__)

# In the training of the CLIP but not of the aggregator, so it is found by its name only.
HELD_OUT = "bus"


@dataclass(frozen=True, kw_only=True, slots=True)
class CatsegTrainingConfig:
    """Settings of the training; the shipped weights were trained with the defaults.

    Attributes:
        seed: Seed of scenes, batches and the initial weights.
        steps: Optimiser steps; about 0.6 s each on one core.
        scenes: Rendered scenes per base domain.
        batch: Images per step.
        learning_rate: Peak learning rate of all weights but CLIP's; 30 steps of warm-up, then
            cosine decay to 1 %.
        clip_multiplier: Factor on the learning rate of CLIP's q and v weights, as in CAT-Seg's
            code (``CLIP_MULTIPLIER``).
        jitter: Standard deviation of the random gain, and of the random offset of each channel.
        log_every: Steps between log lines.
    """

    seed: int = 0
    steps: int = 450
    scenes: int = 600
    batch: int = 8
    learning_rate: float = 3e-3
    clip_multiplier: float = 0.01
    jitter: float = 0.1
    log_every: int = 50


def catseg_config(vocab_size: int) -> CATSegConfig:
    """Return the architecture of the miniature CAT-Seg."""
    vision, text = CLIP_CONFIG["vision_cfg"], CLIP_CONFIG["text_cfg"]
    return CATSegConfig(
        image_size=vision["image_size"],
        patch=vision["patch_size"],
        position_grid=vision["image_size"] // vision["patch_size"],
        vision_width=vision["width"],
        vision_layers=vision["layers"],
        vision_heads=vision["width"] // vision["head_width"],
        embed_dim=CLIP_CONFIG["embed_dim"],
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        context_length=text["context_length"],
        vocab_size=vocab_size,
        guidance_dims=(32, 16),
        hidden=32,
        layers=1,
        window=8,
        appearance_dim=32,
        text_dim=32,
        decoder_dims=(16, 8),
        decoder_guidance_dims=(12, 8),
    )


def train_catseg(config: CatsegTrainingConfig, clip: nn.Module) -> CATSeg:
    """Train a CAT-Seg around ``clip`` and return it in evaluation mode.

    The held-out class is not among the class names, and its pixels are ignored by the loss. As
    background, they would train the model to reject classes without a trained name.
    """
    images, labels = _scenes(config)
    torch.manual_seed(derive(config.seed, "pretrain-catseg", "weights"))
    words = tokenizer()
    model = catseg_from_clip(clip, catseg_config(words.vocab_size)).train()
    freeze_clip(model)
    optimiser_step = _optimiser_step(model, config)
    total, started = 0.0, time.perf_counter()
    for step in range(1, config.steps + 1):
        generator = numpy_generator(config.seed, "pretrain-catseg", "batch", step)
        batch = _draw_batch(images, labels, config, generator)
        loss = _loss(model, words(_prompts(generator)), *batch)
        optimiser_step.update(step, loss)
        total += loss.item()
        if step % config.log_every == 0:
            mean, seconds = total / config.log_every, time.perf_counter() - started
            logger.info("step %d, %.0f s: loss %.4f", step, seconds, mean)
            total = 0.0
    return model.eval()


def _loss(model: CATSeg, prompts: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images, model.encode_text(prompts)[:, None])
    return catseg_bce(logits.float(), labels, mask_ignored=True)


def _scenes(config: CatsegTrainingConfig) -> tuple[ndarray, ndarray]:
    """Return (n, h, w, 3) images of the base domains and (n, h, w) labels.

    Labels are indices of the trained classes; the held-out class is 255.
    """
    table = np.full(len(CLASSES), IGNORE, np.uint8)
    trained = [label for label in range(len(CLASSES)) if label != class_id(HELD_OUT)]
    table[trained] = np.arange(len(trained))
    rendered = [
        render(domain, config.scenes, config.seed, "pretrain-catseg") for domain in BASE_DOMAINS
    ]
    images = np.concatenate([images for images, _ in rendered])
    return images, table[np.concatenate([masks for _, masks in rendered])]


def _draw_batch(
    images: ndarray, labels: ndarray, config: CatsegTrainingConfig, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    rows = generator.choice(len(images), config.batch, replace=False)
    image, label = images[rows], labels[rows]
    if generator.random() < 0.5:
        image, label = image[:, :, ::-1], label[:, :, ::-1]
    gain = 1 + config.jitter * generator.standard_normal((config.batch, 1, 1, 1))
    offset = config.jitter * generator.standard_normal((config.batch, 3, 1, 1))
    inputs = normalise(torch.from_numpy(np.ascontiguousarray(image)))
    inputs = inputs * torch.from_numpy(gain).float() + torch.from_numpy(offset).float()
    return inputs, torch.from_numpy(np.ascontiguousarray(label))


def _prompts(generator: np.random.Generator) -> list[str]:
    return [PROMPT.format(class_word(name, generator)) for name in CLASSES if name != HELD_OUT]


def _optimiser_step(model: CATSeg, config: CatsegTrainingConfig) -> OptimiserStep:
    groups: list[dict[str, Any]] = parameter_groups(
        model, lr=config.learning_rate, clip_multiplier=config.clip_multiplier
    )

    def rate(peak: float, step: int) -> float:
        cosine = 0.495 * (1 + math.cos(math.pi * (step - 1) / config.steps)) + 0.01
        return peak * min(1.0, step / 30) * cosine

    return OptimiserStep(torch.optim.AdamW(groups), model.parameters(), rate, clip_norm=1.0)
