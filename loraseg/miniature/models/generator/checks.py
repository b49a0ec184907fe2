"""Acceptance checks of the miniature generator and its judge on scenes outside their training."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import nn

from loraseg.backbones.diffusion import DiffusionBase
from loraseg.compat import prepare_torchvision
from loraseg.evaluate.agreement import measure_agreement
from loraseg.miniature.models.clip.checks import auc
from loraseg.miniature.models.clip.model import encode_dense, normalise
from loraseg.miniature.world.canvas import CLASSES
from loraseg.miniature.world.domains import DOMAINS, FAMILIES
from loraseg.miniature.world.render import presence, render
from loraseg.seeding import torch_generator
from loraseg.segment.closed_set.checkpoint import ClosedSetSegmenter
from loraseg.synth.region_attention import RegionControl
from loraseg.synth.sampling import SamplingBatch, SamplingConfig, denoise
from loraseg.tensor_types import Float, UInt8

__all__ = ["domain_report", "judge_report", "sample", "word_report"]

SAMPLING = SamplingConfig(steps=12, guidance=1.5, scheduler="ddim", batch=32)
# Domains whose words are checked; some are similar, and some do not look like photographs.
WORD_DOMAINS = ("clear-day", "fog-heavy", "snow", "night", "desert", "sepia", "topdown", "sketch")
_PROMPT_DOMAIN = "clear-day"
_BATCH = 50


def judge_report(
    judge: ClosedSetSegmenter, base: DiffusionBase, *, seed: int = 0, scenes: int = 40
) -> dict[str, Any]:
    """Measure the judge on scenes of every domain, before and after the codec.

    The mIoU after the codec is the ceiling of every generator with this codec.

    Args:
        judge: The segmenter that labels images.
        base: The generator with the codec.
        seed: Seed of the scenes, drawn with the key "gates".
        scenes: Number of scenes per domain.
    """
    figures: dict[str, dict[str, float]] = {"judge_miou": {}, "ceiling_miou": {}, "codec_psnr": {}}
    first: dict[str, float] = {}
    for domain in DOMAINS:
        images, masks = render(domain, scenes, seed, "gates")
        coded = _encode_decode(base, images)
        real = measure_agreement(judge.labels, images, masks, CLASSES)
        first = first or {name: round(value, 3) for name, value in real.classes.items()}
        figures["judge_miou"][domain] = real.right
        figures["ceiling_miou"][domain] = measure_agreement(
            judge.labels, coded, masks, CLASSES
        ).right
        figures["codec_psnr"][domain] = _psnr(images, coded)
    means = {
        f"{key}_mean": round(float(np.mean([*row.values()])), 4) for key, row in figures.items()
    }
    rounded = {
        f"{key}_by_domain": {domain: round(value, 4) for domain, value in row.items()}
        for key, row in figures.items()
    }
    return {
        **means,
        **rounded,
        f"judge_iou_{next(iter(DOMAINS))}": first,
        "setting": {"seed": seed, "scenes_per_domain": scenes},
    }


def word_report(
    judge: ClosedSetSegmenter, base: DiffusionBase, *, seed: int = 0, prompts: int = 128
) -> dict[str, Any]:
    """Measure whether the judge finds the classes of a prompt in the generated image.

    Each prompt lists all classes of a held-out scene, so classes occur together as in scenes. The
    score of a class in an image is its area.
    """
    _, masks = render(_PROMPT_DOMAIN, prompts, seed, "gates")
    named = presence(masks)
    labels = judge.labels(sample(base, [_list_prompt(row) for row in named], seed))
    areas = np.stack([(labels == label).sum((1, 2)) for label in range(len(CLASSES))], 1)
    aucs = {
        name: round(auc(areas[:, label], named[:, label]), 4) for label, name in enumerate(CLASSES)
    }
    return {
        "object_word_auc": aucs,
        "object_word_auc_mean": round(float(np.mean([*aucs.values()])), 4),
        "object_word_auc_min": min(aucs.values()),
        "setting": {
            "seed": seed,
            "prompts": prompts,
            "domain": _PROMPT_DOMAIN,
            **_sampling_settings(),
        },
    }


def domain_report(
    clip: nn.Module,
    base: DiffusionBase,
    *,
    seed: int = 0,
    pictures: int = 24,
    domains: Sequence[str] = WORD_DOMAINS,
) -> dict[str, Any]:
    """Measure how often an image is nearest to the centroid of the domain in its prompt.

    The centroids are those of 60 scenes of every domain in the miniature CLIP. Another domain of
    the same family counts in the family accuracy only.
    """
    names = list(DOMAINS)
    centroids = np.stack(
        [_embed(clip, render(name, 60, seed, "gates")[0]).mean(0) for name in names]
    )
    exact, related = {}, {}
    for domain in domains:
        _, masks = render(domain, pictures, seed, "gates")
        prompts = [_list_prompt(row, domain) for row in presence(masks)]
        vectors = _embed(clip, sample(base, prompts, seed))
        distances = np.linalg.norm(vectors[:, None] - centroids, axis=-1)
        nearest = [names[index] for index in distances.argmin(1)]
        family = FAMILIES[DOMAINS[domain].family]
        exact[domain] = round(float(np.mean([name == domain for name in nearest])), 3)
        related[domain] = round(float(np.mean([name in family for name in nearest])), 3)
    return {
        "domain_word_accuracy": round(float(np.mean([*exact.values()])), 4),
        "domain_word_accuracy_by_domain": exact,
        "domain_word_family_accuracy": round(float(np.mean([*related.values()])), 4),
        "domain_word_family_accuracy_by_domain": related,
        "setting": {"seed": seed, "pictures_per_domain": pictures, **_sampling_settings()},
    }


@torch.no_grad()
def sample(base: DiffusionBase, prompts: Sequence[str], seed: int) -> UInt8[ndarray, "n h w 3"]:
    """Generate an image of each prompt, without regions, with few trailing DDIM steps."""
    base = dataclasses.replace(base, scheduler=_trailing_scheduler(base.scheduler))
    control, empty = RegionControl(base.unet), base.encode_unconditional()
    side = base.image_size // base.latent_factor
    parts: list[ndarray] = []
    for start in range(0, len(prompts), SAMPLING.batch):
        texts = list(prompts[start : start + SAMPLING.batch])
        noise = torch.randn(
            (len(texts), base.latent_channels, side, side),
            generator=torch_generator(seed, "gates", "noise", start),
        )
        batch = SamplingBatch(noise, base.encode_text(texts), tuple(range(len(texts))), empty, [])
        with torch.autocast(base.device.type, torch.bfloat16):
            latents = denoise(base, control, batch, SAMPLING)
        parts.append(base.decode_latents(latents.float(), slice_size=SAMPLING.batch).cpu().numpy())
    return np.concatenate(parts)


def _trailing_scheduler(own: Any) -> Any:
    prepare_torchvision()
    import diffusers

    schedulers: Any = diffusers
    return schedulers.DDIMScheduler.from_config(own.config, timestep_spacing="trailing")


def _sampling_settings() -> dict[str, Any]:
    return {"steps": SAMPLING.steps, "guidance": SAMPLING.guidance, "scheduler": "DDIM, trailing"}


def _list_prompt(present: ndarray, domain: str = _PROMPT_DOMAIN) -> str:
    words = [CLASSES[label] for label in np.flatnonzero(present)]
    return " ".join([*words, DOMAINS[domain].phrases[-1]])


def _encode_decode(base: DiffusionBase, images: ndarray) -> ndarray:
    latents = base.encode_images(torch.from_numpy(images))
    return base.decode_latents(latents, slice_size=_BATCH).cpu().numpy()


def _psnr(images: ndarray, others: ndarray) -> float:
    error = images.astype(np.float64) - others
    return float(10 * np.log10(255**2 / np.square(error).mean()))


@torch.inference_mode()
def _embed(clip: nn.Module, images: ndarray) -> Float[ndarray, "n d"]:
    """Return the global embeddings, not normalised."""
    parts = [
        encode_dense(clip, normalise(torch.from_numpy(images[start : start + _BATCH])))[0]
        for start in range(0, len(images), _BATCH)
    ]
    return torch.cat(parts).numpy()
