"""Buffers of fixed size that hold the stacked adapters of several mixes."""

from collections.abc import Mapping, Sequence

import torch

from loraseg.adapters.packed import PackedAdapter, WeightShape
from loraseg.fuse.mix import Mix
from loraseg.tensor_types import Float, Tensor

__all__ = ["AdapterBuffers"]

# The rows of each layer that a mix occupies: equal layouts overwrite each other completely.
_Layout = tuple[tuple[int, WeightShape, int, tuple[str, ...]], ...]


class AdapterBuffers:
    """Buffers for the adapters of ``count`` mixes of at most ``rank`` rows each.

    Memory: ``count * rank * sum over layers (d_in + d_out)`` values.
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
        # Creating hundreds of views for each batch would take longer than filling the buffers.
        self._views = {
            name: (self._down[shape][:, index], self._up[shape][:, index])
            for shape, names in self.layers.items()
            for index, name in enumerate(names)
        }

    def view(
        self, layer: str
    ) -> tuple[Float[Tensor, "slots r d_in"], Float[Tensor, "slots r d_out"]]:
        """Return views of the down and up rows of one layer, for all slots."""
        return self._views[layer]

    def fill(self, slot: int, mix: Mix | None) -> None:
        """Copy a mix into a slot, with its weights folded into the up side.

        A slot that already holds the mix is left alone.

        Args:
            slot: 0 to ``count`` - 1.
            mix: A mix of at most ``rank`` rows that changes only ``layers``; None for zeros.
        """
        digest = mix.digest if mix else None
        if digest is not None and self._slot_digests[slot] == digest:
            return
        self._slot_digests[slot] = None  # until the copy is complete
        parts = mix.parts if mix else ()
        layout = _layout(parts)
        if layout != self._layouts[slot]:
            for buffer in (*self._down.values(), *self._up.values()):
                buffer[slot].zero_()
        self._layouts[slot] = layout  # before the rows: an error may leave only some of them
        start = 0
        for adapter, weight in parts:
            self._write(slot, start, adapter, weight)
            start += adapter.rank
        self._slot_digests[slot] = digest

    def _write(self, slot: int, start: int, adapter: PackedAdapter, weight: float) -> None:
        for shape, block in adapter.blocks.items():
            rows = slice(start, start + block.rank)
            layers = self._layer_indices(shape, block.layers)
            down, up = self._down[shape][slot], self._up[shape][slot]
            if isinstance(layers, slice) and block.up.device == up.device:
                down[layers, rows].copy_(block.down)
                torch.mul(block.up.to(up.dtype), weight, out=up[layers, rows])
            else:
                down[layers, rows] = block.down.to(down)
                up[layers, rows] = block.up.to(up) * weight

    def _layer_indices(self, shape: WeightShape, layers: tuple[str, ...]) -> slice | list[int]:
        """Return the positions of an adapter's layers in the buffers."""
        key = (shape, layers)
        if key not in self._index_cache:
            positions = {name: index for index, name in enumerate(self.layers[shape])}
            indices = [positions[name] for name in layers]
            first, last = indices[0], indices[-1]
            contiguous = last - first + 1 == len(indices)
            self._index_cache[key] = slice(first, last + 1) if contiguous else indices
        return self._index_cache[key]


def _layout(parts: Sequence[tuple[PackedAdapter, float]]) -> _Layout:
    rows: list[tuple[int, WeightShape, int, tuple[str, ...]]] = []
    start = 0
    for adapter, _ in parts:
        rows += [(start, shape, b.rank, b.layers) for shape, b in adapter.blocks.items()]
        start += adapter.rank
    return tuple(rows)
