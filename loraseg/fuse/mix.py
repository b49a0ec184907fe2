"""Mixes: the adapters that an image is segmented with, and their weights."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from loraseg.adapters.adapter import Adapter
from loraseg.adapters.packed import PackedAdapter, pack
from loraseg.errors import AdapterMismatchError
from loraseg.fuse.concat import concat_lora
from loraseg.tensor_types import Tensor, ndarray

__all__ = ["Mix", "check_weights", "fuse"]


@dataclass(frozen=True, eq=False)
class Mix:
    """A weighted sum of adapters: ``delta W = sum_i w_i up_i^T down_i`` for every layer.

    This is SemLA's fused adapter (:func:`~loraseg.fuse.concat.concat_lora`). A mix only holds
    references; :class:`~loraseg.fuse.bank.AdapterBank` computes the sum.

    Attributes:
        parts: (adapter, weight) in the order in which they were fused.
    """

    parts: tuple[tuple[PackedAdapter, float], ...]

    @cached_property
    def digest(self) -> str:
        """Sha256 (hex) of the parts: equal digests mean equal weights on equal adapters."""
        # repr gives the shortest exact form of a float, so nearly equal weights stay distinct.
        text = json.dumps([[adapter.digest, repr(weight)] for adapter, weight in self.parts])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def rank(self) -> int:
        """Number of stacked rows: the sum of the adapters' ranks."""
        return sum(adapter.rank for adapter, _ in self.parts)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the mix as one adapter: (down (R, d_in), up (d_out, R)) by layer name.

        All weights are folded into the down side. Layers that no part changes are missing.

        Raises:
            AdapterMismatchError: Two parts disagree on the shape of a layer.
        """
        factors: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
        for adapter, weight in self.parts:
            for block in adapter.blocks.values():
                for layer, down, up in zip(block.layers, block.down, block.up, strict=True):
                    factors.setdefault(layer, []).append((down, up.T, weight))
        try:
            return {
                layer: concat_lora(*map(list, zip(*factors[layer], strict=True)))
                for layer in sorted(factors)
            }
        except AdapterMismatchError as error:
            raise AdapterMismatchError(f"mix {self.digest[:12]}: {error}") from error


def fuse(adapters: Sequence[Adapter | PackedAdapter], weights: Sequence[float] | ndarray) -> Mix:
    """Fuse adapters into one mix. Ranks and layers may differ between adapters.

    Args:
        adapters: At least one. Those with a known base digest must share it.
        weights: One finite weight per adapter (n,); any sign, need not sum to one.

    Raises:
        AdapterMismatchError: Counts differ, a weight is not finite, bases differ, or an adapter is
            not a plain sum of low-rank products (DoRA, rsLoRA, trained biases or full modules).
    """
    check_weights(weights, len(adapters))
    packed = [a if isinstance(a, PackedAdapter) else pack(a) for a in adapters]
    with_base = [adapter for adapter in packed if adapter.base_digest is not None]
    for adapter in with_base[1:]:
        if adapter.base_digest != with_base[0].base_digest:
            raise AdapterMismatchError(
                f"adapter {adapter.name!r}: trained on base {adapter.base_digest}, expected "
                f"{with_base[0].base_digest} like adapter {with_base[0].name!r}"
            )
    return Mix(tuple(zip(packed, (float(weight) for weight in weights), strict=True)))


def check_weights(weights: Sequence[float] | ndarray, count: int) -> None:
    """Check that there are ``count`` > 0 weights (count,) and that all are finite.

    Raises:
        AdapterMismatchError: They are not.
    """
    if not len(weights) == count > 0:
        raise AdapterMismatchError(
            f"need one weight per adapter, and at least one adapter: got {count} adapters, "
            f"{len(weights)} weights"
        )
    for i, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise AdapterMismatchError(f"weight {i}: got {weight}, expected a finite number")
