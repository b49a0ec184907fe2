"""A different mix of adapters for each image of a batch, at about the cost of the base model.

The LoRA rows of a mix are stacked in buffers of fixed size, one slot per mix, with the mixing
weights folded into the up side. A layer either adds the low-rank product to its output
(``x W^T + (x down^T) up``) or uses a merged copy of its weight (``W + up^T down`` in scratch
memory), whichever is faster (:mod:`loraseg.fuse.merging`). The base's weights are only read, so
nothing has to be restored and nothing drifts. The cost of a forward pass depends on the mixes in
use, not on the number of adapters in the library.

On the CPU the slots run one after the other. On a GPU they run together as batched products with
constant shapes and addresses, so that compiled or captured code stays valid between batches.
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

# A mix of unusual rank, such as the uniform mix of all adapters, gets separate buffers.
_MAX_BUFFERS = 2
_RANK_STEP = 8


class AdapterBank:
    """Applies mixes to the linear layers of a model. For inference; one thread per model."""

    def __init__(
        self, model: nn.Module, *, table: MergeTable | None = None, batched: bool | None = None
    ) -> None:
        """Find the linear layers of a model; nothing is allocated yet.

        Args:
            model: A frozen model. Layers with two inputs take ``forward(x, guide)``, where a
                weight (d_out, d + a) acts on x (b, s, ..., d) and guide (b, ..., a), shared
                along s.
            table: When to merge; by default the table of the model's device and dtype.
            batched: Whether to run all mixes together; by default only on a GPU.
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
        """Apply n mixes to n equal parts of the leading axis of every layer's input.

        Inside the ``with`` block part i of the leading axis runs with ``mixes[i]``; None is the
        bare base. Neighbouring parts with the same digest share merged weights. Gradients are
        disabled inside the block.

        Raises:
            AdapterMismatchError: A layer is unknown or has another size.
            StageError: Other mixes or training pairs are in use on this model.
        """
        if self._in_use:
            raise StageError("other adapter mixes are in use on this model; leave them first")
        attached: list[MixedLayer] = []
        self._in_use = True
        try:
            if any(mix is not None for mix in mixes):
                attached = self._attach(mixes)
            with torch.no_grad():
                yield
        finally:
            for layer in attached:
                layer.detach()
            self._in_use = False

    def _attach(self, mixes: Sequence[Mix | None]) -> list[MixedLayer]:
        plan, slots = self._plan(mixes)
        buffers = self._buffers_for([mix for mix in slots if mix is not None], len(slots))
        for slot, mix in enumerate(slots):
            buffers.fill(slot, mix)
        attached: list[MixedLayer] = []
        try:
            for shape, names in buffers.layers.items():
                for name in names:
                    layer = self._layers[name]
                    layer.attach(plan, *buffers.view(name), self._scratch_for(shape))
                    attached.append(layer)
        except BaseException:
            for layer in attached:
                layer.detach()
            raise
        return attached

    def _plan(self, mixes: Sequence[Mix | None]) -> tuple[BatchPlan, list[Mix | None]]:
        """Return the plan and the mix of each slot."""
        device, table = self._device_and_dtype[0], self._merge_table()
        runs = [list(run) for _, run in groupby(mixes, lambda mix: mix.digest if mix else None)]
        if self._batched or (self._batched is None and device.type == "cuda"):
            # An image may have several windows, and several images the same mix: use the
            # smallest number of equal parts.
            slots = list(mixes[:: gcd(*map(len, runs))])
            return BatchPlan(len(slots), _mix_digests(slots), (), True, table), slots
        slots: list[Mix | None] = [run[0] for run in runs if run[0] is not None]
        segments: list[MixSegment] = []
        start = slot = 0
        for run in runs:
            bare = run[0] is None
            segments.append(MixSegment(start, start + len(run), None if bare else slot))
            start, slot = start + len(run), slot + (not bare)
        return BatchPlan(len(mixes), _mix_digests(slots), tuple(segments), False, table), slots

    def _buffers_for(self, mixes: Sequence[Mix], count: int) -> AdapterBuffers:
        """Return buffers that can hold these mixes, the most recently used ones if possible."""
        for adapter in {id(a): a for mix in mixes for a, _ in mix.parts}.values():
            self._register(adapter)
        device, dtype = self._device_and_dtype
        rank = max(max(mix.rank for mix in mixes), 1)
        for index, buffers in enumerate(self._buffers):
            fits = buffers.count >= count and rank <= buffers.rank <= 2 * rank
            same = (buffers.device, buffers.dtype) == (device, dtype)
            if fits and same and sum(map(len, buffers.layers.values())) == len(self._layers):
                self._buffers.insert(0, self._buffers.pop(index))
                return buffers
        by_shape: dict[WeightShape, list[str]] = {}
        for name in sorted(self._layers):
            by_shape.setdefault(self._layers[name].shape, []).append(name)
        rank = -(-rank // _RANK_STEP) * _RANK_STEP
        others = [buffers for buffers in self._buffers if not rank <= buffers.rank <= 2 * rank]
        new = AdapterBuffers(by_shape, count=count, rank=rank, device=device, dtype=dtype)
        self._buffers = [new, *others][:_MAX_BUFFERS]
        return new

    def _register(self, adapter: PackedAdapter) -> None:
        """Check that an adapter fits the model and register its layers."""
        if adapter.digest in self._checked_digests:
            return
        check_fits(adapter, self._linears)
        for name in _layer_names(adapter):
            if name not in self._layers:
                self._layers[name] = MixedLayer(name, self._linears[name])
        self._checked_digests.add(adapter.digest)

    def _scratch_for(self, shape: WeightShape) -> Tensor:
        device, dtype = self._device_and_dtype
        scratch = self._scratch.get(shape)
        if scratch is None or (scratch.device, scratch.dtype) != (device, dtype):
            scratch = self._scratch[shape] = torch.empty(shape, device=device, dtype=dtype)
        return scratch

    @property
    def _device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Current device and dtype of the model."""
        weight = next(iter(self._linears.values())).weight
        return weight.device, weight.dtype

    def _merge_table(self) -> MergeTable:
        if self._given_table is not None:
            return self._given_table
        if self._device_and_dtype not in self._tables:
            self._tables[self._device_and_dtype] = load_table(*self._device_and_dtype)
        return self._tables[self._device_and_dtype]


def check_fits(adapter: PackedAdapter, linears: Mapping[str, nn.Linear]) -> None:
    """Check that the model has every layer that an adapter changes, with the same weight shape.

    Args:
        adapter: The adapter.
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
