"""Exact fusion of LoRA adapters by concatenation along the rank (methods B.5)."""

import math
from collections.abc import Sequence

import torch

from loraseg.adapters.adapter import Adapter, LoraPair, Mix
from loraseg.errors import AdapterMismatchError
from loraseg.tensor_types import Float, Tensor, ndarray

__all__ = ["check_weights", "concat_lora", "fuse"]


def concat_lora(
    downs: Sequence[Float[Tensor, "_ _"]],
    ups: Sequence[Float[Tensor, "_ _"]],
    weights: Sequence[float],
) -> tuple[Float[Tensor, "r_sum d_in"], Float[Tensor, "d_out r_sum"]]:
    """Stack n LoRA pairs so that one product equals their weighted sum.

    ``up @ down == sum_i weights[i] * (ups[i] @ downs[i])`` up to rounding. The
    rank grows to ``r_sum = sum_i r_i``; no d_out x d_in matrix is formed.

    Args:
        downs: A_i, one (r_i, d_in) matrix per adapter; ranks may differ.
        ups: B_i, one (d_out, r_i) matrix per adapter. alpha_i / r_i must be in
            a factor or in the weight already.
        weights: One weight per adapter; any sign, need not sum to one.

    Raises:
        AdapterMismatchError: Counts differ, or a pair disagrees with adapter 0
            on d_in or d_out, or with itself on its rank.
    """
    if not len(downs) == len(ups) == len(weights) > 0:
        raise AdapterMismatchError(
            f"need one down, up and weight per adapter, and at least one adapter: "
            f"got {len(downs)} downs, {len(ups)} ups, {len(weights)} weights"
        )
    d_in, d_out = downs[0].shape[1], ups[0].shape[0]
    for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
        rank = down.shape[0]
        if down.shape[1] != d_in or up.shape != (d_out, rank):
            raise AdapterMismatchError(
                f"adapter {i}: down {tuple(down.shape)}, up {tuple(up.shape)}; "
                f"expected down (r, {d_in}) and up ({d_out}, r) as in adapter 0"
            )
    # On one side only: split as sqrt(w) * sqrt(w) a weight could not be negative. The down side
    # is peft's choice for `cat`, so the factors compare with peft's one by one.
    scaled = [weight * down for weight, down in zip(weights, downs, strict=True)]
    return torch.cat(scaled, dim=0), torch.cat(list(ups), dim=1)


def fuse(adapters: Sequence[Adapter], weights: Sequence[float] | ndarray) -> Mix:
    """Fuse adapters into one mix with ``delta W = sum_i w_i scale_i B_i A_i`` for every module.

    Ranks may differ, and an adapter that lacks a module adds nothing to it.

    Args:
        adapters: At least one; trained on one base as far as their base digests are known.
        weights: One finite weight per adapter; any sign, need not sum to one.

    Raises:
        AdapterMismatchError: Counts differ, a weight is not finite, bases differ, shapes differ,
            or an adapter is more than a sum of products or scaled otherwise (DoRA, rsLoRA,
            trained biases or whole modules).
    """
    check_weights(weights, len(adapters))
    for adapter in adapters:
        _refuse_undefined(adapter)
    _refuse_other_bases(adapters)
    numbers = [float(weight) for weight in weights]
    # Not a set: the order of modules, and with it any serialised form, must not vary.
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.pairs)
    pairs = {module: _fuse_module(module, adapters, numbers) for module in modules}
    parts = zip((adapter.digest for adapter in adapters), numbers, strict=True)
    return Mix(tuple(parts), pairs)


def check_weights(weights: Sequence[float] | ndarray, count: int) -> None:
    """Check that there is one finite weight for each of ``count`` > 0 things to mix.

    Raises:
        AdapterMismatchError: As the summary says.
    """
    if not len(weights) == count > 0:
        raise AdapterMismatchError(
            f"need one weight per adapter, and at least one adapter: got {count} adapters, "
            f"{len(weights)} weights"
        )
    for i, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise AdapterMismatchError(f"weight {i}: got {weight}, expected a finite number")


def _fuse_module(
    module: str, adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    present: list[tuple[LoraPair, float]] = [
        (adapter.pairs[module], weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        if module in adapter.pairs
    ]
    try:
        return concat_lora(
            [pair.down for pair, _ in present],
            [pair.up for pair, _ in present],
            [weight * pair.scale for pair, weight in present],
        )
    except AdapterMismatchError as error:
        raise AdapterMismatchError(f"module {module!r}: {error}") from error


def _refuse_undefined(adapter: Adapter) -> None:
    reason = adapter.beyond_pairs()
    if adapter.use_rslora:
        reason = "rsLoRA scaling (alpha / sqrt(r))"
    if reason is not None:
        raise AdapterMismatchError(
            f"adapter {adapter.name!r}: cannot be fused, it has {reason}; expected plain LoRA"
        )


def _refuse_other_bases(adapters: Sequence[Adapter]) -> None:
    known = [adapter for adapter in adapters if adapter.base_digest is not None]
    for adapter in known[1:]:
        if adapter.base_digest != known[0].base_digest:
            raise AdapterMismatchError(
                f"adapter {adapter.name!r}: trained on base {adapter.base_digest}, expected "
                f"{known[0].base_digest} as of adapter {known[0].name!r}"
            )
