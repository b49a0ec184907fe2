"""Sampling against the stock diffusers pipeline, and the cost of region attention.

Model, initial noise, batch, steps, scheduler, guidance and dtype are equal; from prompts and
noise to uint8 pixels, decoding included. The model is the shipped miniature, or one of its sizes
with random weights if it is missing.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch

import loraseg
from loraseg.backbones.diffusion import DiffusionBase, load_diffusion
from loraseg.compat import prepare_torchvision
from loraseg.data.labels import LabelSpace
from loraseg.seeding import numpy_generator
from loraseg.synth.conditioning import Conditioner, ConditioningConfig
from loraseg.synth.generator import Generator
from loraseg.synth.region_attention import RegionControl
from loraseg.synth.sampling import NoiseStream, SamplingConfig
from tests.bench.harness import Times, interleave, ratio, setting, single_thread

IMAGES, STEPS, SIDE, ROUNDS = 5, 10, 64, 7
GUIDANCE = 2.0
CLASSES = ("road", "sky", "car", "tree", "building", "person")
EMBEDDED = Path(loraseg.__file__).parent / "miniature" / "weights" / "generator"


def run() -> dict[str, object]:
    with single_thread(), torch.no_grad():
        pipeline, base, source = _models()
        off, on = (_generator(base, regions=regions) for regions in (False, True))
        shares = _with_learned_shares(base)
        masks = [("mask", _mask(0))]
        [*made] = off.generate(masks)
        noise = _noise(base, made[0].lineage.mask_id)
        prompt = made[0].lineage.prompt

        def stock() -> np.ndarray:
            images = pipeline(
                prompt,
                num_images_per_prompt=IMAGES,
                height=SIDE,
                width=SIDE,
                latents=noise,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                output_type="np",
            ).images
            return (images * 255).round().astype(np.uint8)

        times: Times = interleave(
            {
                "stock": stock,
                "off": lambda: list(off.generate(masks)),
                "on": lambda: list(on.generate(masks)),
                "shares": lambda: list(shares.generate(masks)),
            },
            rounds=ROUNDS,
        )
        same = np.abs(stock().astype(int) - np.stack([one.image for one in made])).max()
        counts = _counts(base)
        cached = _cached_against_uncached(base)
        checks = {
            "counts_minimal": counts["got"] == counts["least"],
            "psnr_60db": cached["psnr_db"] >= 60,
            "as_stock": int(same) <= 1,
        }
    return {
        "bench": "sampler",
        "ratios": {
            "vs_stock_off": ratio(times, "off", "stock"),
            "region_on_vs_off": ratio(times, "on", "off"),
            "learned_shares_on_vs_off": ratio(times, "shares", "off"),
        },
        "checks": checks,
        "setting": setting(
            times,
            model=source,
            images=IMAGES,
            pixels=[SIDE, SIDE],
            steps=STEPS,
            scheduler="pndm",
            guidance=GUIDANCE,
            counts=counts,
            cached_against_uncached=cached,
            largest_pixel_difference_to_stock=int(same),
        ),
    }


def _models() -> tuple[object, DiffusionBase, str]:
    """Return the stock pipeline, a base with the same parts, and their description."""
    prepare_torchvision()
    from diffusers import StableDiffusionPipeline

    if EMBEDDED.is_dir():
        base = load_diffusion("miniature")
        parts = {
            "vae": base.vae,
            "text_encoder": base.text_encoders[0],
            "tokenizer": base.tokenizers[0],
            "unet": base.unet,
            "scheduler": base.scheduler,
        }
        source = "the embedded miniature"
    else:
        parts, source = _random_parts(), "of the miniature's shape, random weights"
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return (
        pipeline,
        DiffusionBase.from_pipeline(pipeline, name="miniature", digest="0" * 64),
        source,
    )


def _random_parts() -> dict[str, object]:
    from diffusers import PNDMScheduler

    from loraseg.miniature.models.generator.model import (
        NOISE_SCHEDULE,
        build_codec,
        build_text_encoder,
        build_unet,
    )
    from loraseg.miniature.models.generator.text import build_tokenizer

    torch.manual_seed(0)
    return {
        "vae": build_codec(),
        "text_encoder": build_text_encoder(),
        "tokenizer": build_tokenizer(),
        "unet": build_unet(),
        "scheduler": PNDMScheduler(
            **NOISE_SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
        ),
    }


def _generator(base: DiffusionBase, *, regions: bool) -> Generator:
    conditioner = Conditioner(base.tokenizers, LabelSpace(CLASSES), ConditioningConfig())
    config = SamplingConfig(
        images=IMAGES,
        steps=STEPS,
        guidance=GUIDANCE,
        batch=IMAGES,
        decode_slice=IMAGES,
        regions=regions,
    )
    return Generator(base, conditioner, config=config)


def _with_learned_shares(base: DiffusionBase) -> Generator:
    """Return a generator with a learned mix of plain and rectified attention in every module."""
    made = _generator(base, regions=True)
    cross = [n for n, m in base.unet.named_modules() if getattr(m, "is_cross_attention", False)]
    made._control = RegionControl(base.unet, alpha_modules=cross)
    return made


def _mask(number: int) -> np.ndarray:
    random = numpy_generator(0, "bench", "sampler", number)
    blocks = random.integers(number % 2, len(CLASSES), (SIDE // 8, SIDE // 8)).astype(np.uint8)
    return np.kron(blocks, np.ones((8, 8), dtype=np.uint8))


def _noise(base: DiffusionBase, mask_id: str) -> torch.Tensor:
    side = SIDE // base.latent_factor
    shape = (base.latent_channels, side, side)
    return torch.stack([NoiseStream(0, mask_id, k).initial(shape) for k in range(IMAGES)])


def _counts(base: DiffusionBase) -> dict[str, dict[str, int]]:
    """Count the computations for two masks with different prompts, and the necessary ones."""
    own = _generator(base, regions=True)
    text = base.encoded_prompts
    calls: list[int] = []
    handle = base.unet.register_forward_hook(lambda *_: calls.append(1))
    masks = [("a", _mask(0)), ("b", _mask(1))]
    prompts = len({one.lineage.prompt for one in own.generate(masks)})
    handle.remove()
    cross = sum(getattr(m, "is_cross_attention", False) for m in base.unet.modules())
    return {
        "got": {
            "text": base.encoded_prompts - text,
            "unet": len(calls),
            "projections": own.projections_computed,
        },
        "least": {
            "text": prompts + 1,  # and the unconditional one
            "unet": 2 * (STEPS + 1),  # PLMS repeats its first step; two batches
            "projections": cross * 2 * prompts,  # each batch has a prompt and the unconditional one
        },
    }


def _cached_against_uncached(base: DiffusionBase) -> dict[str, float]:
    """Compare with a run that projects all rows of the text in every step."""
    cached, plain = (_generator(base, regions=True) for _ in range(2))
    plain._control.cached_text = lambda *_: contextlib.nullcontext()
    masks = [("mask", _mask(0))]
    latents = [torch.stack([o.latents for o in g.generate(masks)]) for g in (cached, plain)]
    first, second = (_pixels(base, one) for one in latents)
    error = float((first - second).double().square().mean())
    return {
        "psnr_db": round(10 * float(np.log10(4 / max(error, 1e-20))), 1),
        "largest_latent_difference": float((latents[0] - latents[1]).abs().max()),
        "projections": [cached.projections_computed, plain.projections_computed],
    }


def _pixels(base: DiffusionBase, latents: torch.Tensor) -> torch.Tensor:
    """Return unrounded pixels in [-1, 1]."""
    return base.vae.decode(latents / base.vae.config.scaling_factor).sample.clamp(-1, 1)
