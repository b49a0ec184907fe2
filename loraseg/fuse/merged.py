"""Merge one mix into the weights, for batches whose samples all use the same mix.

Inside the block the layers hold ``W + delta``, so a forward pass costs exactly as much as that of
the base. :class:`loraseg.fuse.bank.AdapterBank` handles mixes that differ between images.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from loraseg.fuse.bank import check_fits
from loraseg.fuse.mix import Mix
from loraseg.fuse.mixed_layer import MERGED_ATTRIBUTE, require_unmodified

__all__ = ["merged"]


@contextmanager
def merged(model: nn.Module, mix: Mix | None) -> Generator[None, None, None]:
    """Replace the weights of the linear layers that a mix changes by ``W + delta``.

    The sum is formed in float32 (float64 for float64 weights) and rounded once to the dtype of
    the weight. On exit the original parameter objects are restored: nothing is subtracted, so
    nothing drifts. Gradients stay enabled, but the merged weights do not require any.

    Args:
        model: A model with linear layers of the names in the mix.
        mix: The mix; None changes nothing.

    Raises:
        AdapterMismatchError: A layer is unknown or has another size, or parts disagree on one.
        StageError: Other adapters, mixes or training pairs are in use on one of the layers.
    """
    if mix is None:
        yield
        return
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for adapter, _ in mix.parts:
        check_fits(adapter, linears)
    pairs = mix.pairs()
    for name in pairs:
        require_unmodified(name, linears[name])
    originals: list[tuple[nn.Linear, nn.Parameter]] = []
    try:
        for name, (down, up) in pairs.items():
            linear = linears[name]
            weight = cast(nn.Parameter, linear.weight)  # typed as Tensor by torch
            originals.append((linear, weight))
            vars(linear)[MERGED_ATTRIBUTE] = mix.digest
            linear.weight = _merged_weight(weight, down, up)
        yield
    finally:
        for linear, weight in originals:
            linear.weight = weight
            vars(linear).pop(MERGED_ATTRIBUTE, None)


def _merged_weight(weight: nn.Parameter, down: torch.Tensor, up: torch.Tensor) -> nn.Parameter:
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        base, down, up = (t.detach().to(weight.device, wide) for t in (weight, down, up))
        total = torch.addmm(base, up, down).to(weight.dtype)
    return nn.Parameter(total, requires_grad=False)
