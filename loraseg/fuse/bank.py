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

from loraseg.adapters.packed import PackedAdapter, WeightShape
from loraseg.errors import AdapterMismatchError, StageError
from loraseg.fuse.buffers import AdapterBuffers
from loraseg.fuse.merging import MergeTable, load_table
from loraseg.fuse.mix import Mix
from loraseg.fuse.mixed_layer import BatchPlan, MixedLayer, MixSegment
from loraseg.tensor_types import Tensor

__all__ = ["AdapterBank", "check_fits"]

# Mixes of other sizes than the usual one, such as that of all adapters, get buffers of their own.
_MAX_BUFFERS = 2
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
        self._layers: dict[str, MixedLayer] = {}
        self._checked_digests: set[str] = set()
        self._buffers: list[AdapterBuffers] = []
        self._scratch: dict[WeightShape, Tensor] = {}
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
                opened = self._attach(mixes)
            with torch.no_grad():
                yield
        finally:
            for site in opened:
                site.detach()
            self._in_use = False

    def _attach(self, mixes: Sequence[Mix | None]) -> list[MixedLayer]:
        plan, order = self._plan(mixes)
        slots = self._buffers_for([mix for mix in order if mix is not None], len(order))
        for index, mix in enumerate(order):
            slots.fill(index, mix)
        opened: list[MixedLayer] = []
        try:
            for shape, names in slots.layers.items():
                for name in names:
                    site = self._layers[name]
                    site.attach(plan, *slots.view(name), self._scratch_for(shape))
                    opened.append(site)
        except BaseException:
            for site in opened:
                site.detach()
            raise
        return opened

    def _plan(self, mixes: Sequence[Mix | None]) -> tuple[BatchPlan, list[Mix | None]]:
        """Return the plan and what each slot has to hold."""
        device, table = self._device_and_dtype[0], self._merge_table()
        runs = [list(run) for _, run in groupby(mixes, lambda mix: mix.digest if mix else None)]
        if self._batched or (self._batched is None and device.type == "cuda"):
            # Images of several windows each, or several with one mix: as few parts as are equal.
            order = list(mixes[:: gcd(*map(len, runs))])
            return BatchPlan(len(order), _mix_digests(order), (), True, table), order
        order: list[Mix | None] = [run[0] for run in runs if run[0] is not None]
        segments: list[MixSegment] = []
        start = slot = 0
        for run in runs:
            bare = run[0] is None
            segments.append(MixSegment(start, start + len(run), None if bare else slot))
            start, slot = start + len(run), slot + (not bare)
        return BatchPlan(len(mixes), _mix_digests(order), tuple(segments), False, table), order

    def _buffers_for(self, mixes: Sequence[Mix], count: int) -> AdapterBuffers:
        """Return buffers with room for these mixes, the most recently used ones first."""
        for adapter in {id(a): a for mix in mixes for a, _ in mix.parts}.values():
            self._register(adapter)
        device, dtype = self._device_and_dtype
        rank = max(max(mix.rank for mix in mixes), 1)
        for index, slots in enumerate(self._buffers):
            roomy = slots.count >= count and rank <= slots.rank <= 2 * rank
            same = (slots.device, slots.dtype) == (device, dtype)
            if roomy and same and sum(map(len, slots.layers.values())) == len(self._layers):
                self._buffers.insert(0, self._buffers.pop(index))
                return slots
        wanted: dict[WeightShape, list[str]] = {}
        for name in sorted(self._layers):
            wanted.setdefault(self._layers[name].shape, []).append(name)
        rank = -(-rank // _RANK_STEP) * _RANK_STEP
        self._buffers = [slots for slots in self._buffers if not rank <= slots.rank <= 2 * rank]
        made = AdapterBuffers(wanted, count=count, rank=rank, device=device, dtype=dtype)
        self._buffers = [made, *self._buffers][:_MAX_BUFFERS]
        return made

    def _register(self, adapter: PackedAdapter) -> None:
        """Check that an adapter fits the model, and note its layers."""
        if adapter.digest in self._checked_digests:
            return
        check_fits(adapter, self._linears)
        for name in _layer_names(adapter):
            if name not in self._layers:
                self._layers[name] = MixedLayer(name, self._linears[name])
        self._checked_digests.add(adapter.digest)

    def _scratch_for(self, shape: WeightShape) -> Tensor:
        device, dtype = self._device_and_dtype
        known = self._scratch.get(shape)
        if known is None or (known.device, known.dtype) != (device, dtype):
            known = self._scratch[shape] = torch.empty(shape, device=device, dtype=dtype)
        return known

    @property
    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the model is now, and its type."""
        weight = next(iter(self._linears.values())).weight
        return weight.device, weight.dtype

    def _merge_table(self) -> MergeTable:
        if self._given_table is not None:
            return self._given_table
        if self._device_and_dtype not in self._tables:
            self._tables[self._device_and_dtype] = load_table(*self._device_and_dtype)
        return self._tables[self._device_and_dtype]


def check_fits(adapter: PackedAdapter, linears: Mapping[str, nn.Linear]) -> None:
    """Check that every layer which an adapter changes is there, and has its size.

    Args:
        adapter: Any.
        linears: The linear layers of the model, by name.

    Raises:
        AdapterMismatchError: A layer is unknown or has another size.
    """
    for shape, block in adapter.blocks.items():
        for name in block.layers:
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


def _mix_digests(mixes: Sequence[Mix | None]) -> tuple[str | None, ...]:
    return tuple(mix.digest if mix else None for mix in mixes)


def _layer_names(adapter: PackedAdapter) -> Iterable[str]:
    return (name for block in adapter.blocks.values() for name in block.layers)
