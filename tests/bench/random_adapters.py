"""Adapters with random weights, of any size."""

import torch
from torch import nn

from loraseg.adapters import Adapter, LoraPair, load_adapter, target_modules, to_peft_files
from loraseg.seeding import torch_generator

__all__ = ["random_adapter"]


def random_adapter(model: nn.Module, number: int, *, rank: int, prefix: str = "") -> Adapter:
    """Return adapter ``number`` of all target layers whose names start with ``prefix``."""
    pairs: dict[str, LoraPair] = {}
    for name in target_modules(model):
        if name.startswith(prefix):
            d_out, d_in = model.get_submodule(name).weight.shape
            random = torch_generator(number, "bench", name)
            down = torch.randn(rank, d_in, generator=random) * d_in**-0.5
            up = torch.randn(d_out, rank, generator=random) * 0.1
            pairs[name] = LoraPair(down, up, 1.0)
    return load_adapter(to_peft_files(pairs, base_name="bench"), name=str(number))
