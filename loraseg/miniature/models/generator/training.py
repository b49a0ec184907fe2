"""Pretraining of the miniature generator: the latent codec, the UNet and the judge."""

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraseg.compat import prepare_torchvision
from loraseg.miniature.models.generator.model import (
    NOISE_SCHEDULE,
    build_codec,
    build_text_encoder,
    build_unet,
)
from loraseg.miniature.models.generator.scenes import CAPTIONS_PER_SCENE, CaptionedScenes
from loraseg.miniature.models.generator.text import CaptionEncoder
from loraseg.miniature.world.canvas import CLASSES
from loraseg.seeding import derive
from loraseg.segment.closed_set.networks import ClosedSetNetwork, NetworkConfig, build_network
from loraseg.train.core.optimisation import OptimiserStep

__all__ = ["GeneratorTrainingConfig", "train_codec", "train_judge", "train_text_to_image"]

logger = logging.getLogger(__name__)

_EMPTY_CAPTIONS = 0.1
_MAX_WEIGHT = 5.0
# Number of images that determine the standard deviation of latents, and batch size of encoding.
_DEVIATION_IMAGES, _ENCODE_BATCH = 2048, 1024
# Small objects have few pixels and are weighted twice.
_RARE_CLASSES = ("bus", "person", "pole", "sign", "car")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorTrainingConfig:
    """Settings of the pretraining; the model card describes the training of the shipped weights.

    Attributes:
        seed: Seed of scenes, batches, noise and the initial weights.
        scenes: Rendered scenes per domain.
        codec_steps: Training steps of the latent codec.
        judge_steps: Training steps of the judge.
        steps: Training steps of the UNet.
        batch: Images per step; codec and judge use at most 256.
        learning_rate: Peak learning rate of the UNet; cosine decay to 2 %.
        warm: Steps of warm-up.
        ema: Decay of the averaged weights, which are the ones that are saved.
        compiled: Whether the UNet is compiled, which is faster on a GPU.
        device: Device of the training.
    """

    seed: int = 0
    scenes: int = 8_000
    codec_steps: int = 4_000
    judge_steps: int = 5_000
    steps: int = 4_000
    batch: int = 1024
    learning_rate: float = 1.5e-3
    warm: int = 500
    ema: float = 0.9995
    compiled: bool = False
    device: str = "cpu"


def train_codec(config: GeneratorTrainingConfig, scenes: CaptionedScenes) -> Any:
    """Train the latent codec; its scaling factor gives latents of unit standard deviation."""
    device = torch.device(config.device)
    torch.manual_seed(derive(config.seed, "pretrain-generator", "codec"))
    codec = build_codec().to(device).train()
    average = copy.deepcopy(codec).requires_grad_(False)
    images = torch.from_numpy(scenes.images)
    optimiser_step = _optimiser_step(codec, 2e-3, config.codec_steps, weight_decay=0.0)
    for step in range(config.codec_steps):
        rows = torch.randint(len(images), (min(config.batch, 256),))
        x = _pixels(images[rows], device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = codec.encode(x).latent_dist
            out = codec.decode(posterior.sample()).sample
        error = out.float() - x
        loss = error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().mean() / 4096
        optimiser_step.update(step, loss)
        _update_ema(average, codec, min(0.999, step / (step + 10)))
        if step % 500 == 499:
            logger.info("codec %d: PSNR %.2f", step + 1, _psnr(error))
    with torch.inference_mode():
        rows = torch.randint(len(images), (min(_DEVIATION_IMAGES, len(images)),))
        deviation = float(average.encode(_pixels(images[rows], device)).latent_dist.mode().std())
    average.register_to_config(scaling_factor=round(1 / deviation, 5))
    return average.eval()


def train_judge(config: GeneratorTrainingConfig, scenes: CaptionedScenes) -> ClosedSetNetwork:
    """Train the judge, the segmenter that measures the agreement of images and masks."""
    device = torch.device(config.device)
    torch.manual_seed(derive(config.seed, "pretrain-generator", "judge"))
    network = build_network(NetworkConfig(width=24), len(CLASSES)).to(device).train()
    images, masks = torch.from_numpy(scenes.images), torch.from_numpy(scenes.masks)
    weights = torch.tensor(
        [2.0 if name in _RARE_CLASSES else 1.0 for name in CLASSES], device=device
    )
    optimiser_step = _optimiser_step(network.body, 3e-3, config.judge_steps)
    for step in range(config.judge_steps):
        rows = torch.randint(len(images), (min(config.batch, 256),))
        x, target = _pixels(images[rows], device), masks[rows].to(device).long()
        if step % 2:
            x, target = x.flip(3), target.flip(2)
        with torch.autocast(device.type, torch.bfloat16):
            logits = network.body(x)
        loss = functional.cross_entropy(logits.float(), target, weights)
        optimiser_step.update(step, loss)
    return network.eval()


def train_text_to_image(
    config: GeneratorTrainingConfig,
    codec: Any,
    scenes: CaptionedScenes,
    checkpoint: Callable[[Any, int], None] = lambda model, step: None,
    *,
    every: int = 200,
    init: nn.Module | None = None,
) -> Any:
    """Train the UNet on captions, without masks, and return it with averaged weights.

    Args:
        config: Settings.
        codec: Codec from :func:`train_codec`.
        scenes: Images and captions; flipped images are used as well.
        checkpoint: Called with the averaged UNet and the number of steps.
        every: Steps between calls of ``checkpoint``.
        init: UNet from which training starts; it is copied.
    """
    device = torch.device(config.device)
    torch.manual_seed(derive(config.seed, "pretrain-generator", "weights"))
    live: Any = build_unet() if init is None else copy.deepcopy(init).float().requires_grad_(True)
    live.to(device, memory_format=torch.channels_last).train()
    if device.type == "cpu":
        # On a CPU the backward pass of fused attention would take half of the time.
        prepare_torchvision()
        from diffusers.models.attention_processor import AttnProcessor

        live.set_attn_processor(AttnProcessor())
    average = copy.deepcopy(live).requires_grad_(False).eval()
    words = build_text_encoder().to(device)
    unet = torch.compile(live) if config.compiled else live
    draw = _BatchSampler(
        _encode_all(codec, scenes, device), torch.from_numpy(scenes.captions).to(device)
    )
    optimiser_step = _optimiser_step(live, config.learning_rate, config.steps, warm=config.warm)
    started = time.perf_counter()
    losses: list[float] = []
    for step in range(config.steps):
        batch = draw(config.batch)
        with torch.no_grad():
            hidden = words(input_ids=batch.ids)[0]
        with torch.autocast(device.type, torch.bfloat16):
            out = unet(batch.noisy, batch.times, hidden, return_dict=False)[0]
        error = (out.float() - batch.target).square().mean((1, 2, 3))
        loss = (batch.weights * error).mean()
        optimiser_step.update(step, loss)
        _update_ema(average, live, min(config.ema, (step + 1) / (step + 10)))
        losses.append(float(loss.detach()))
        if step % every == every - 1:
            steps_per_s = (step + 1) / (time.perf_counter() - started)
            mean = sum(losses[-every:]) / every
            logger.info("step %d: loss %.4f, %.2f steps/s", step + 1, mean, steps_per_s)
            checkpoint(average, step + 1)
    return average


@dataclasses.dataclass(slots=True)
class _DenoisingBatch:
    ids: Tensor
    noisy: Tensor
    times: Tensor
    target: Tensor
    weights: Tensor


class _BatchSampler:
    """Draws latents with captions, times and noise, and computes the velocities to predict.

    The loss of an image is min(SNR + 1, 5) times its squared error in x0: low noise levels train
    texture, high ones the layout, which the captions describe.
    """

    def __init__(self, latents: Tensor, captions: Tensor) -> None:
        self._latents, self._captions = latents, captions
        self._empty = torch.from_numpy(CaptionEncoder().encode("")).to(latents.device).long()
        self._alphas = _alphas_cumprod(latents.device)

    def __call__(self, count: int) -> _DenoisingBatch:
        device = self._latents.device
        rows = torch.randint(len(self._captions), (count,), device=device)
        flips = torch.randint(2, (count,), device=device)
        ids = self._captions[
            rows, torch.randint(CAPTIONS_PER_SCENE, (count,), device=device)
        ].long()
        ids[torch.rand(count, device=device) < _EMPTY_CAPTIONS] = self._empty
        clean = self._latents[flips, rows].float()
        times = torch.randint(len(self._alphas), (count,), device=device)
        noise, alphas = torch.randn_like(clean), self._alphas[times][:, None, None, None]
        signal, spread = alphas.sqrt(), (1 - alphas).sqrt()
        noisy = (signal * clean + spread * noise).contiguous(memory_format=torch.channels_last)
        ratio = (self._alphas / (1 - self._alphas))[times]
        weights = (ratio + 1).clamp(max=_MAX_WEIGHT) / (ratio + 1)
        return _DenoisingBatch(ids, noisy, times, signal * noise - spread * clean, weights)


@torch.inference_mode()
def _encode_all(codec: Any, scenes: CaptionedScenes, device: torch.device) -> Tensor:
    """Return the float16 latents (2, n, c, h, w) of the images and their mirror images."""
    images = torch.from_numpy(scenes.images)
    sides: list[Tensor] = []
    for flipped in (False, True):
        rows: list[Tensor] = []
        for start in range(0, len(images), _ENCODE_BATCH):
            x = _pixels(images[start : start + _ENCODE_BATCH], device)
            x = x.flip(3) if flipped else x
            rows.append(codec.encode(x).latent_dist.mode().half())
        sides.append(torch.cat(rows))
    return torch.stack(sides) * codec.config.scaling_factor


def _alphas_cumprod(device: torch.device) -> Tensor:
    root = torch.linspace(
        NOISE_SCHEDULE["beta_start"] ** 0.5,
        NOISE_SCHEDULE["beta_end"] ** 0.5,
        NOISE_SCHEDULE["num_train_timesteps"],
    )
    return (1 - root.square()).cumprod(0).to(device)


def _psnr(error: Tensor) -> float:
    """Return the PSNR in dB for errors of pixels in [-1, 1]."""
    return -10 * math.log10(float(error.detach().square().mean()) / 4)


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _optimiser_step(
    model: nn.Module, peak: float, steps: int, *, warm: int = 100, weight_decay: float = 0.01
) -> OptimiserStep:
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, peak, weight_decay=weight_decay, betas=(0.9, 0.98))

    def rate(peak: float, step: int) -> float:
        cosine = 0.49 * (1 + math.cos(math.pi * step / steps)) + 0.02
        return peak * cosine * min(1.0, (step + 1) / warm)

    return OptimiserStep(optimiser, parameters, rate, clip_norm=1.0)


def _update_ema(average: nn.Module, live: nn.Module, keep: float) -> None:
    with torch.no_grad():
        for mean, value in zip(average.parameters(), live.parameters(), strict=True):
            mean.lerp_(value, 1 - keep)
