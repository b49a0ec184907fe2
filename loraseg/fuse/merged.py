"""One mix in the weights themselves, for as long as every sample of every batch runs with it.

Where mixes differ from image to image there is :class:`loraseg.fuse.bank.AdapterBank`. Here the
layers hold ``W + delta`` meanwhile, so that a forward pass costs exactly what the bare base costs.
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
    """Let the linear layers that a mix changes hold ``W + delta`` within the block.

    The sum is formed in float32 (float64 for float64 weights) and rounded once to the weight's
    type. Afterwards the very same parameter objects are back: nothing is subtracted, so nothing
    drifts. Gradients are not switched off, but the merged weights have none.

    Args:
        model: Any with linear layers of the mix's names.
        mix: None changes nothing.

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
    kept: list[tuple[nn.Linear, nn.Parameter]] = []
    try:
        for name, (down, up) in pairs.items():
            linear = linears[name]
            weight = cast(nn.Parameter, linear.weight)  # torch calls it a Tensor
            kept.append((linear, weight))
            vars(linear)[MERGED_ATTRIBUTE] = mix.digest
            linear.weight = _merged_weight(weight, down, up)
        yield
    finally:
        for linear, weight in kept:
            linear.weight = weight
            vars(linear).pop(MERGED_ATTRIBUTE, None)


def _merged_weight(weight: nn.Parameter, down: torch.Tensor, up: torch.Tensor) -> nn.Parameter:
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        base, down, up = (t.detach().to(weight.device, wide) for t in (weight, down, up))
        total = torch.addmm(base, up, down).to(weight.dtype)
    return nn.Parameter(total, requires_grad=False)
