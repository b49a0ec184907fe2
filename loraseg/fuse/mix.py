"""Which adapters an image is segmented with, and how much of each (methods B.5)."""

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

    It holds references only; :class:`loraseg.fuse.bank.AdapterBank` forms the sum where it acts.

    Attributes:
        parts: (adapter, weight) in the order they were fused.
    """

    parts: tuple[tuple[PackedAdapter, float], ...]

    @cached_property
    def digest(self) -> str:
        """The sha256 of the parts: equal digests mean equal weights on equal adapters."""
        # repr of a float is its shortest exact form, so nearly equal weights keep apart.
        text = json.dumps([[adapter.digest, repr(weight)] for adapter, weight in self.parts])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def rank(self) -> int:
        """Rows of the stacked adapters: the sum of their ranks."""
        return sum(adapter.rank for adapter, _ in self.parts)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the mix as one adapter, by module name (down (R, d_in), up (d_out, R)).

        All weights are on the down side. Layers that no part changes are missing.

        Raises:
            AdapterMismatchError: Two parts disagree on the shape of a layer.
        """
        found: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
        for adapter, weight in self.parts:
            for block in adapter.blocks.values():
                for site, down, up in zip(block.layers, block.down, block.up, strict=True):
                    found.setdefault(site, []).append((down, up.T, weight))
        try:
            return {
                site: concat_lora(*map(list, zip(*found[site], strict=True)))
                for site in sorted(found)
            }
        except AdapterMismatchError as error:
            raise AdapterMismatchError(f"mix {self.digest[:12]}: {error}") from error


def fuse(adapters: Sequence[Adapter | PackedAdapter], weights: Sequence[float] | ndarray) -> Mix:
    """Fuse adapters into one mix. Ranks and layers may differ from adapter to adapter.

    Args:
        adapters: At least one; trained on one base as far as their base digests are known.
        weights: One finite weight per adapter; any sign, need not sum to one.

    Raises:
        AdapterMismatchError: Counts differ, a weight is not finite, bases differ, or an adapter is
            more than a sum of products or scaled otherwise (DoRA, rsLoRA, trained biases or whole
            modules).
    """
    check_weights(weights, len(adapters))
    packed = [a if isinstance(a, PackedAdapter) else pack(a) for a in adapters]
    known = [adapter for adapter in packed if adapter.base_digest is not None]
    for adapter in known[1:]:
        if adapter.base_digest != known[0].base_digest:
            raise AdapterMismatchError(
                f"adapter {adapter.name!r}: trained on base {adapter.base_digest}, expected "
                f"{known[0].base_digest} as of adapter {known[0].name!r}"
            )
    return Mix(tuple(zip(packed, (float(weight) for weight in weights), strict=True)))


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
