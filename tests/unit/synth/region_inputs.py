"""Tiny pipelines, random masks and UNet inputs for tests of region attention."""

import numpy as np
import torch

from loraseg.data.labels import LabelSpace
from loraseg.synth.conditioning import Conditioner, ConditioningConfig
from tests.unit.tiny_diffusion import tiny_sd, tiny_sdxl

NAMES = ("road", "sidewalk", "traffic light", "sky", "car")
LONG_NAMES = tuple(f"bicycle {chr(97 + i)}" for i in range(26))
PIPELINES = {
    "sd": tiny_sd(),
    "v": tiny_sd("v_prediction", seed=1),
    "sdxl": tiny_sdxl(),
}


def random_conditions(pipeline, names=NAMES, *, count=2, side=16):
    """Return conditions of random blocky masks with ignored pixels."""
    generator = np.random.default_rng(0)
    tokenizers = [pipeline.tokenizer]
    if hasattr(pipeline, "tokenizer_2"):
        tokenizers.append(pipeline.tokenizer_2)
    conditioner = Conditioner(
        tokenizers, LabelSpace(names), ConditioningConfig(template="a {classes}")
    )
    conditions = []
    for _ in range(count):
        blocks = generator.integers(0, len(names), (side // 2, side // 2))
        mask = blocks.repeat(2, 0).repeat(2, 1).astype(np.uint8)
        mask[generator.random(mask.shape) < 0.1] = 255
        conditions.append(conditioner(mask))
    return conditions


def unet_inputs(unet, rows, latent=(16, 16), dtype=torch.float32):
    """Return random latents and text encodings, and SDXL's additional conditions."""
    generator = torch.Generator().manual_seed(3)
    width = unet.config.cross_attention_dim
    arguments = {
        "sample": torch.randn((rows, 4, *latent), generator=generator, dtype=dtype),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn((rows, 77, width), generator=generator, dtype=dtype),
    }
    if unet.config.addition_embed_type == "text_time":
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.randn((rows, 12), generator=generator, dtype=dtype),
            "time_ids": torch.full((rows, 6), 32.0, dtype=dtype),
        }
    return arguments


def cross_modules(unet):
    return {n: m for n, m in unet.named_modules() if getattr(m, "is_cross_attention", False)}


def random_alphas(control, seed=0):
    """Return random alpha layers, whose shares differ between positions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator)
        for key, value in control.alpha_state().items()
    }


def run_unet(control, regions, arguments, unet, *, unconditional=0):
    latent = tuple(arguments["sample"].shape[2:])
    masks = control.regions(regions, unconditional=unconditional, latent=latent)
    with torch.no_grad(), control.installed(), masks:
        return unet(**arguments).sample
