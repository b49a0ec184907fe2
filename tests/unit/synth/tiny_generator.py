"""Tiny pipelines, masks and adapters for tests of the generator."""

import functools

import numpy as np
import pytest
import torch

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.targets.unet import select_projections
from loraseg.backbones.diffusion import DiffusionBase
from loraseg.data.labels import LabelSpace
from loraseg.synth.conditioning import Conditioner, ConditioningConfig
from loraseg.synth.generator import Generator
from loraseg.synth.sampling import SamplingConfig
from tests.unit.tiny_diffusion import tiny_sd, tiny_sdxl

SPACE = LabelSpace(("road", "sky", "car", "sidewalk"))
DIGEST = "ab" * 32
PIPELINES = {
    "sd": tiny_sd,
    "v": functools.partial(tiny_sd, "v_prediction"),
    "sdxl": tiny_sdxl,
}


@functools.cache
def tiny_pipeline(kind):
    return PIPELINES[kind]()


def tiny_base(kind="sd"):
    return _base(kind)


@functools.cache
def _base(kind):
    return DiffusionBase.from_pipeline(tiny_pipeline(kind), name=f"tiny {kind}", digest=DIGEST)


def block_mask(number=0, size=(32, 32)):
    """Return a mask of blocks, with ignored pixels."""
    random = np.random.default_rng(number)
    height, width = size
    classes = 2 + number % 3  # so that prompts differ
    blocks = random.integers(0, classes, (height // 4, width // 4)).astype(np.uint8)
    mask = np.kron(blocks, np.ones((4, 4), dtype=np.uint8))
    mask[:2, :3] = 255
    return mask


def make_generator(kind="sd", *, template="{classes}", adapters=(), heads=(), **settings):
    base = tiny_base(kind)
    conditioner = Conditioner(base.tokenizers, SPACE, ConditioningConfig(template=template))
    config = SamplingConfig(**{"steps": 4, "images": 2, **settings})
    return Generator(base, conditioner, adapters=adapters, heads=heads, config=config)


def random_adapter(name, *, kind="sd", rule="cross", size=0.3, base_digest=DIGEST):
    unet = tiny_base(kind).unet
    random = torch.Generator().manual_seed(sum(map(ord, name)))
    pairs = {}
    for module in select_projections(unet, rule):
        d_out, d_in = unet.get_submodule(module).weight.shape
        down = torch.randn(2, d_in, generator=random) * size
        pairs[module] = LoraPair(down, torch.randn(d_out, 2, generator=random) * size, 0.5)
    return Adapter(name=name, pairs=pairs, digest=name * 8, base_digest=base_digest)


@pytest.fixture
def one_thread():
    """Run in one thread: small products are slower in several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
