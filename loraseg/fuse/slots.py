"""Buffers of a fixed size in which the adapters of several mixes lie stacked."""

from collections.abc import Mapping, Sequence

import torch

from loraseg.adapters.packed import PackedAdapter, Shape
from loraseg.fuse.mix import Mix
from loraseg.tensor_types import Float, Tensor

__all__ = ["Slots"]

# Which rows of which sites an adapter takes: equal layouts overwrite each other completely.
_Layout = tuple[tuple[int, Shape, int, tuple[str, ...]], ...]


class Slots:
    """Room for the adapters of ``count`` mixes of at most ``rank`` rows each.

    Memory: ``count * rank * sum over sites (d_in + d_out)`` values.
    """

    def __init__(
        self,
        sites: Mapping[Shape, Sequence[str]],
        *,
        count: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.sites = {shape: tuple(names) for shape, names in sites.items()}
        self.count, self.rank, self.device, self.dtype = count, rank, device, dtype
        self._down = {
            (o, i): torch.zeros(count, len(names), rank, i, device=device, dtype=dtype)
            for (o, i), names in self.sites.items()
        }
        self._up = {
            (o, i): torch.zeros(count, len(names), rank, o, device=device, dtype=dtype)
            for (o, i), names in self.sites.items()
        }
        self._holds: list[str | None] = [None] * count
        self._layouts: list[_Layout] = [()] * count
        self._places: dict[tuple[Shape, tuple[str, ...]], slice | list[int]] = {}
        # Views are made once: making hundreds for each batch takes longer than filling them.
        self._views = {
            name: (self._down[shape][:, index], self._up[shape][:, index])
            for shape, names in self.sites.items()
            for index, name in enumerate(names)
        }

    def view(
        self, site: str
    ) -> tuple[Float[Tensor, "slots r d_in"], Float[Tensor, "slots r d_out"]]:
        """Return the down and up rows of one layer for all slots; they change with :meth:`fill`."""
        return self._views[site]

    def fill(self, slot: int, mix: Mix | None) -> None:
        """Copy a mix into a slot, weights into the up side; nothing if it is there already.

        Args:
            slot: 0 to ``count`` - 1.
            mix: Of no more than ``rank`` rows and of known sites; None for all zeros.
        """
        digest = mix.digest if mix else None
        if digest is not None and self._holds[slot] == digest:
            return
        self._holds[slot] = None  # until it is whole
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
        self._holds[slot] = digest

    def _write(self, slot: int, start: int, adapter: PackedAdapter, weight: float) -> None:
        for shape, block in adapter.blocks.items():
            rows = slice(start, start + block.rank)
            place = self._place(shape, block.sites)
            down, up = self._down[shape][slot], self._up[shape][slot]
            if isinstance(place, slice) and block.up.device == up.device:
                down[place, rows].copy_(block.down)
                torch.mul(block.up.to(up.dtype), weight, out=up[place, rows])
            else:
                down[place, rows] = block.down.to(down)
                up[place, rows] = block.up.to(up) * weight

    def _place(self, shape: Shape, sites: tuple[str, ...]) -> slice | list[int]:
        """Return where an adapter's sites are among ours."""
        key = (shape, sites)
        if key not in self._places:
            ours = {name: index for index, name in enumerate(self.sites[shape])}
            found = [ours[name] for name in sites]
            first, last = found[0], found[-1]
            dense = last - first + 1 == len(found)
            self._places[key] = slice(first, last + 1) if dense else found
        return self._places[key]


def _layout(parts: Sequence[tuple[PackedAdapter, float]]) -> _Layout:
    rows: list[tuple[int, Shape, int, tuple[str, ...]]] = []
    start = 0
    for adapter, _ in parts:
        rows += [(start, shape, b.rank, b.sites) for shape, b in adapter.blocks.items()]
        start += adapter.rank
    return tuple(rows)
