"""LoRA's own start: a random down matrix, and an up matrix of zeros."""

from collections.abc import Sequence

import torch
from torch import nn

from loraseg.adapters.init.initialiser import InitialPairs, ParameterGroup
from loraseg.seeding import torch_generator
from loraseg.tensor_types import Tensor

__all__ = ["init_lora"]


def init_lora(
    model: nn.Module, modules: Sequence[str], *, rank: int, alpha: float, seed: int
) -> InitialPairs:
    """Return pairs that leave the model's output unchanged.

    A is uniform in ±1 / sqrt(d_in), which is ``kaiming_uniform_(A, a=sqrt(5))`` of
    ``loralib/layers.py`` (microsoft/LoRA); B is zero. Each module draws from a random stream of its
    own, so that its start does not depend on the other modules.

    Args:
        model: The base.
        modules: Full names of its linear layers.
        rank: r of every pair.
        alpha: The scale is ``alpha / rank``.
        seed: Seed of the random streams.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module in modules:
        weight = model.get_submodule(module).get_parameter("weight")
        d_out, d_in = weight.shape
        unit = torch.rand((rank, d_in), generator=torch_generator(seed, "lora", module))
        down = ((2 * unit - 1) * d_in**-0.5).to(weight.device)
        pairs[module] = down, torch.zeros((d_out, rank), device=weight.device)
    return InitialPairs(
        pairs=pairs, scale=alpha / rank, groups=(ParameterGroup(modules=tuple(modules)),)
    )
