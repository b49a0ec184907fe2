"""Buffers of a fixed size in which the adapters of several mixes lie stacked."""

from collections.abc import Mapping, Sequence

import torch

from loraseg.adapters.packed import PackedAdapter, WeightShape
from loraseg.fuse.mix import Mix
from loraseg.tensor_types import Float, Tensor

__all__ = ["AdapterBuffers"]

# Which rows of which sites an adapter takes: equal layouts overwrite each other completely.
_Layout = tuple[tuple[int, WeightShape, int, tuple[str, ...]], ...]


class AdapterBuffers:
    """Room for the adapters of ``count`` mixes of at most ``rank`` rows each.

    Memory: ``count * rank * sum over sites (d_in + d_out)`` values.
    """

    def __init__(
        self,
        layers: Mapping[WeightShape, Sequence[str]],
        *,
        count: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layers = {shape: tuple(names) for shape, names in layers.items()}
        self.count, self.rank, self.device, self.dtype = count, rank, device, dtype
        self._down = {
            (o, i): torch.zeros(count, len(names), rank, i, device=device, dtype=dtype)
            for (o, i), names in self.layers.items()
        }
        self._up = {
            (o, i): torch.zeros(count, len(names), rank, o, device=device, dtype=dtype)
            for (o, i), names in self.layers.items()
        }
        self._slot_digests: list[str | None] = [None] * count
        self._layouts: list[_Layout] = [()] * count
        self._index_cache: dict[tuple[WeightShape, tuple[str, ...]], slice | list[int]] = {}
        # Views are made once: making hundreds for each batch takes longer than filling them.
        self._views = {
            name: (self._down[shape][:, index], self._up[shape][:, index])
            for shape, names in self.layers.items()
            for index, name in enumerate(names)
        }

    def view(
        self, layer: str
    ) -> tuple[Float[Tensor, "slots r d_in"], Float[Tensor, "slots r d_out"]]:
        """Return the down and up rows of one layer for all slots; they change with :meth:`fill`."""
        return self._views[layer]

    def fill(self, slot: int, mix: Mix | None) -> None:
        """Copy a mix into a slot, weights into the up side; nothing if it is there already.

        Args:
            slot: 0 to ``count`` - 1.
            mix: Of no more than ``rank`` rows and of known sites; None for all zeros.
        """
        digest = mix.digest if mix else None
        if digest is not None and self._slot_digests[slot] == digest:
            return
        self._slot_digests[slot] = None  # until it is whole
        parts = mix.parts if mix else ()
        layout = _layout(parts)
        if layout != self._layouts[slot]:
            for buffer in (*self._down.values(), *self._up.values()):
                buffer[slot].zero_()
        self._layouts[slot] = layout  # ahead of the rows: half of them may be all that is written
        start = 0
        for adapter, weight in parts:
            self._write(slot, start, adapter, weight)
            start += adapter.rank
        self._slot_digests[slot] = digest

    def _write(self, slot: int, start: int, adapter: PackedAdapter, weight: float) -> None:
        for shape, block in adapter.blocks.items():
            rows = slice(start, start + block.rank)
            place = self._layer_indices(shape, block.layers)
            down, up = self._down[shape][slot], self._up[shape][slot]
            if isinstance(place, slice) and block.up.device == up.device:
                down[place, rows].copy_(block.down)
                torch.mul(block.up.to(up.dtype), weight, out=up[place, rows])
            else:
                down[place, rows] = block.down.to(down)
                up[place, rows] = block.up.to(up) * weight

    def _layer_indices(self, shape: WeightShape, layers: tuple[str, ...]) -> slice | list[int]:
        """Return where an adapter's sites are among ours."""
        key = (shape, layers)
        if key not in self._index_cache:
            ours = {name: index for index, name in enumerate(self.layers[shape])}
            found = [ours[name] for name in layers]
            first, last = found[0], found[-1]
            dense = last - first + 1 == len(found)
            self._index_cache[key] = slice(first, last + 1) if dense else found
        return self._index_cache[key]


def _layout(parts: Sequence[tuple[PackedAdapter, float]]) -> _Layout:
    rows: list[tuple[int, WeightShape, int, tuple[str, ...]]] = []
    start = 0
    for adapter, _ in parts:
        rows += [(start, shape, b.rank, b.layers) for shape, b in adapter.blocks.items()]
        start += adapter.rank
    return tuple(rows)
