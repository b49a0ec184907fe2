"""A different mix of adapters for every image of one batch, at about the cost of the bare model.

The rows of a mix's adapters lie stacked in buffers of a fixed size, weights folded into the up
side, one slot a mix. Where a layer is called, its rows of each mix either pass beside the weight
(``x W^T + (x down^T) up``) or through a merged copy of it (``W + up^T down`` in scratch memory),
whichever takes less time (:mod:`loraseg.fuse.merging`). The base's weights are only ever read, so
nothing has to be restored and nothing drifts. What a forward pass costs depends on the mixes in
use, not on how many adapters a library has.

On the CPU slots are worked off one by one; on a GPU all at once by batched products, with shapes
and addresses that stay the same from batch to batch, so that compiled or captured code stays
valid.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from math import gcd

import torch
from torch import nn

from loraseg.adapters.packed import PackedAdapter, Shape
from loraseg.errors import AdapterMismatchError, StageError
from loraseg.fuse.merging import MergeTable, load_table
from loraseg.fuse.mix import Mix
from loraseg.fuse.mixed_layer import MixedLayer, Plan, Segment
from loraseg.fuse.slots import Slots
from loraseg.tensor_types import Tensor

__all__ = ["AdapterBank", "check_fits"]

# Mixes of other sizes than the usual one, such as that of all adapters, get buffers of their own.
_KEPT_SLOTS = 2
_RANK_STEP = 8


class AdapterBank:
    """The places of a model where mixes plug in. For inference; one thread a model."""

    def __init__(
        self, model: nn.Module, *, table: MergeTable | None = None, batched: bool | None = None
    ) -> None:
        """Find the linear layers of a model; nothing is allocated yet.

        Args:
            model: Frozen. Layers with two inputs take ``forward(x, guide)``, where a weight
                (d_out, d + a) acts on x (b, s, ..., d) and guide (b, ..., a), shared along s.
            table: When to merge; by default what is known of the model's device and type.
            batched: Work on all mixes at once; by default on a GPU only.
        """
        self._linears = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        self._batched = batched
        self._given_table = table
        self._tables: dict[tuple[torch.device, torch.dtype], MergeTable] = {}
        self._sites: dict[str, MixedLayer] = {}
        self._fitting: set[str] = set()
        self._slots: list[Slots] = []
        self._scratch: dict[Shape, Tensor] = {}
        self._in_use = False

    @contextmanager
    def use(self, mixes: Sequence[Mix | None]) -> Generator[None, None, None]:
        """Let equal shares of the leading axis of every layer's input run with these mixes.

        Within the ``with`` block, n mixes cut the leading axis of what a layer is given into n
        equal parts, in order; None stands for the bare base. Neighbours with one digest share
        their merged weights. Gradients are off meanwhile.

        Raises:
            AdapterMismatchError: A layer is unknown or has another size.
            StageError: Other mixes or training pairs are in use on this model.
        """
        if self._in_use:
            raise StageError("other adapter mixes are in use on this model; leave them first")
        opened: list[MixedLayer] = []
        self._in_use = True
        try:
            if any(mix is not None for mix in mixes):
                opened = self._open(mixes)
            with torch.no_grad():
                yield
        finally:
            for site in opened:
                site.close()
            self._in_use = False

    def _open(self, mixes: Sequence[Mix | None]) -> list[MixedLayer]:
        plan, order = self._plan(mixes)
        slots = self._slots_for([mix for mix in order if mix is not None], len(order))
        for index, mix in enumerate(order):
            slots.fill(index, mix)
        opened: list[MixedLayer] = []
        try:
            for shape, names in slots.sites.items():
                for name in names:
                    site = self._sites[name]
                    site.open(plan, *slots.view(name), self._scratch_of(shape))
                    opened.append(site)
        except BaseException:
            for site in opened:
                site.close()
            raise
        return opened

    def _plan(self, mixes: Sequence[Mix | None]) -> tuple[Plan, list[Mix | None]]:
        """Return the plan and what each slot has to hold."""
        device, table = self._place[0], self._table()
        runs = [list(run) for _, run in groupby(mixes, lambda mix: mix.digest if mix else None)]
        if self._batched or (self._batched is None and device.type == "cuda"):
            # Images of several windows each, or several with one mix: as few parts as are equal.
            order = list(mixes[:: gcd(*map(len, runs))])
            return Plan(len(order), _digests(order), (), True, table), order
        order: list[Mix | None] = [run[0] for run in runs if run[0] is not None]
        segments: list[Segment] = []
        start = slot = 0
        for run in runs:
            bare = run[0] is None
            segments.append(Segment(start, start + len(run), None if bare else slot))
            start, slot = start + len(run), slot + (not bare)
        return Plan(len(mixes), _digests(order), tuple(segments), False, table), order

    def _slots_for(self, mixes: Sequence[Mix], count: int) -> Slots:
        """Return buffers with room for these mixes, the most recently used ones first."""
        for adapter in {id(a): a for mix in mixes for a, _ in mix.parts}.values():
            self._admit(adapter)
        device, dtype = self._place
        rank = max(max(mix.rank for mix in mixes), 1)
        for index, slots in enumerate(self._slots):
            roomy = slots.count >= count and rank <= slots.rank <= 2 * rank
            same = (slots.device, slots.dtype) == (device, dtype)
            if roomy and same and sum(map(len, slots.sites.values())) == len(self._sites):
                self._slots.insert(0, self._slots.pop(index))
                return slots
        wanted: dict[Shape, list[str]] = {}
        for name in sorted(self._sites):
            wanted.setdefault(self._sites[name].shape, []).append(name)
        rank = -(-rank // _RANK_STEP) * _RANK_STEP
        self._slots = [slots for slots in self._slots if not rank <= slots.rank <= 2 * rank]
        made = Slots(wanted, count=count, rank=rank, device=device, dtype=dtype)
        self._slots = [made, *self._slots][:_KEPT_SLOTS]
        return made

    def _admit(self, adapter: PackedAdapter) -> None:
        """Check that an adapter fits the model, and note its layers."""
        if adapter.digest in self._fitting:
            return
        check_fits(adapter, self._linears)
        for name in _names(adapter):
            if name not in self._sites:
                self._sites[name] = MixedLayer(name, self._linears[name])
        self._fitting.add(adapter.digest)

    def _scratch_of(self, shape: Shape) -> Tensor:
        device, dtype = self._place
        known = self._scratch.get(shape)
        if known is None or (known.device, known.dtype) != (device, dtype):
            known = self._scratch[shape] = torch.empty(shape, device=device, dtype=dtype)
        return known

    @property
    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Where the model is now, and its type."""
        weight = next(iter(self._linears.values())).weight
        return weight.device, weight.dtype

    def _table(self) -> MergeTable:
        if self._given_table is not None:
            return self._given_table
        if self._place not in self._tables:
            self._tables[self._place] = load_table(*self._place)
        return self._tables[self._place]


def check_fits(adapter: PackedAdapter, linears: Mapping[str, nn.Linear]) -> None:
    """Check that every layer which an adapter changes is there, and has its size.

    Args:
        adapter: Any.
        linears: The linear layers of the model, by name.

    Raises:
        AdapterMismatchError: A layer is unknown or has another size.
    """
    for shape, block in adapter.blocks.items():
        for name in block.sites:
            linear = linears.get(name)
            if linear is None:
                raise AdapterMismatchError(
                    f"adapter {adapter.name!r}, module {name!r}: the model has no linear layer "
                    f"of that name"
                )
            if tuple(linear.weight.shape) != shape:
                raise AdapterMismatchError(
                    f"adapter {adapter.name!r}, module {name!r}: got an adapter for a weight "
                    f"{shape}, expected {tuple(linear.weight.shape)}"
                )


def _digests(mixes: Sequence[Mix | None]) -> tuple[str | None, ...]:
    return tuple(mix.digest if mix else None for mix in mixes)


def _names(adapter: PackedAdapter) -> Iterable[str]:
    return (name for block in adapter.blocks.values() for name in block.sites)
