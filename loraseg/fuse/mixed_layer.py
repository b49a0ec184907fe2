"""One linear layer while mixes act on it: each part of its input with the mix it belongs to."""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from loraseg.adapters.packed import WeightShape
from loraseg.errors import StageError
from loraseg.fuse.merging import MergeTable
from loraseg.tensor_types import Float, Tensor

__all__ = ["MERGED_ATTRIBUTE", "BatchPlan", "MixSegment", "MixedLayer", "require_unmodified"]

# What :func:`loraseg.fuse.merged.merged` leaves on a layer instance while a mix is in its weight.
MERGED_ATTRIBUTE = "merged_mix"

# Values of a merged weight that is worth keeping: those of the aggregator, not of large towers.
_MAX_CACHED_WEIGHT_SIZE = 2**17


@dataclass(frozen=True, slots=True)
class MixSegment:
    """Neighbouring parts ``start`` to ``stop`` with one mix; ``slot`` None is the bare base."""

    start: int
    stop: int
    slot: int | None


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How the leading axis of every layer's input is shared out.

    Attributes:
        parts: Number of equal parts.
        digests: Of the mix in each slot.
        segments: They cover the parts in order. Not used if ``batched``: slot i is part i's.
        batched: All parts at once, by batched products.
        table: When to merge.
    """

    parts: int
    digests: tuple[str | None, ...]
    segments: tuple[MixSegment, ...]
    batched: bool
    table: MergeTable


class MixedLayer:
    """Stands in for the ``forward`` of one linear layer; its weight is only read."""

    def __init__(self, name: str, linear: nn.Linear) -> None:
        self.name, self.linear = name, linear
        self._plan: BatchPlan | None = None
        self._down = self._up = self._scratch = linear.weight
        self._cached_weights: dict[str | None, Tensor] = {}

    @property
    def shape(self) -> WeightShape:
        """(d_out, d_in) of the weight."""
        return self.linear.out_features, self.linear.in_features

    def attach(
        self,
        plan: BatchPlan,
        down: Float[Tensor, "slots r d_in"],
        up: Float[Tensor, "slots r d_out"],
        scratch: Float[Tensor, "d_out d_in"],
    ) -> None:
        """Take the layer's place until :meth:`close`; ``scratch`` is overwritten at will.

        Raises:
            StageError: Something else stands in its place already.
        """
        require_unmodified(self.name, self.linear)
        self._plan, self._down, self._up, self._scratch = plan, down, up, scratch
        kept, weight = self._cached_weights, self.linear.weight
        self._cached_weights = {key: kept[key] for key in plan.digests if key in kept}
        if any((m.device, m.dtype) != (weight.device, weight.dtype) for m in kept.values()):
            self._cached_weights = {}  # the model has moved
        # On the instance, as hooks cannot keep a layer from computing what is not wanted.
        self.linear.forward = self.forward  # pyright: ignore[reportAttributeAccessIssue]

    def detach(self) -> None:
        """Give the layer its own ``forward`` back."""
        self.linear.__dict__.pop("forward", None)
        self._plan = None

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Return what the layer would with each part's mix added to its weight.

        Args:
            x: (b, ..., d_in), b a multiple of the plan's parts; with a guide (b, s, ..., d).
            guide: (b, ..., a), shared along s; d + a = d_in.
        """
        plan = self._plan
        if plan is None or x.shape[0] % plan.parts:
            raise StageError(
                f"layer {self.name}: got an input of shape {tuple(x.shape)}, expected "
                f"{plan.parts if plan else 'no'} equal parts along the first axis"
            )
        # With a guide (images, s, places, d) and (images, places, a), else (rows, d).
        if guide is None:
            rows, sides = x.reshape(-1, x.shape[-1]), None
        else:
            sides = guide.reshape(len(x), -1, guide.shape[-1])
            rows = x.reshape(len(x), x.shape[1], sides.shape[1], x.shape[-1])
        run = self._run_batched if plan.batched else self._run_segments
        return run(plan, rows, sides).view(*x.shape[:-1], self.shape[0])

    def _run_segments(self, plan: BatchPlan, rows: Tensor, sides: Tensor | None) -> Tensor:
        """Work off one segment after the other, each result straight into its place."""
        out = rows.new_empty(*rows.shape[:-1], self.shape[0])
        each = len(rows) // plan.parts
        tokens = rows.shape[:-1].numel() // plan.parts

        def part(start: int, stop: int) -> _LayerSlice:
            here = slice(start * each, stop * each)
            return rows[here], None if sides is None else sides[here], out[here]

        def is_merged(segment: MixSegment) -> bool:
            count = tokens * (segment.stop - segment.start)
            return segment.slot is not None and plan.table.should_merge(self.shape, count)

        # What passes through the weight itself does so in one large product.
        for merged, run in groupby(plan.segments, is_merged):
            segments = list(run)
            if merged:
                for segment in segments:
                    weight = self._merged_weight(segment)
                    _linear_into(part(segment.start, segment.stop), weight, self.linear.bias)
                continue
            whole = part(segments[0].start, segments[-1].stop)
            _linear_into(whole, self.linear.weight, self.linear.bias)
            for segment in segments:
                self._add_low_rank(segment, part(segment.start, segment.stop))
        return out

    def _merged_weight(self, segment: MixSegment) -> Tensor:
        """Return ``W + up^T down``; what is small is kept while its mix is in use.

        The aggregator calls its layers once for every few classes.
        """
        weight, plan, slot = self.linear.weight, self._plan, segment.slot
        if plan is None or slot is None:
            return weight
        down, up = self._down[slot], self._up[slot]
        if weight.numel() > _MAX_CACHED_WEIGHT_SIZE:
            return torch.addmm(weight, up.t(), down, out=self._scratch)
        digest = plan.digests[slot]
        if digest not in self._cached_weights:
            self._cached_weights[digest] = torch.addmm(weight, up.t(), down)
        return self._cached_weights[digest]

    def _add_low_rank(self, segment: MixSegment, part: "_LayerSlice") -> None:
        if segment.slot is None:
            return
        down, up = self._down[segment.slot], self._up[segment.slot]
        rows, sides, out = part
        low = out.new_empty(*out.shape[:-1], down.shape[0])
        _linear_into((rows, sides, low), down, None)
        out.view(-1, out.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up)

    def _run_batched(self, plan: BatchPlan, rows: Tensor, sides: Tensor | None) -> Tensor:
        """Work on all parts at once; part i has slot i."""
        parts = plan.parts
        down, up = self._down[:parts], self._up[:parts]
        if plan.table.should_merge(self.shape, rows.shape[:-1].numel() // parts):
            weights = torch.baddbmm(self.linear.weight, up.transpose(1, 2), down)
            return _batched_linear(rows, sides, weights, self.linear.bias)
        inputs = (rows,) if sides is None else (rows, sides)
        out = type(self.linear).forward(self.linear, *inputs)
        low = _batched_linear(rows, sides, down, None).reshape(parts, -1, down.shape[1])
        return torch.baddbmm(out.reshape(parts, -1, out.shape[-1]), low, up)


def require_unmodified(name: str, linear: nn.Linear) -> None:
    """Check that no adapters act on a layer, in its weight or in place of its ``forward``.

    Raises:
        StageError: Some do.
    """
    if vars(linear).keys() & {"forward", MERGED_ATTRIBUTE}:
        raise StageError(f"layer {name}: other adapters are in use on it; leave them first")


# Rows, what goes with them on the second input, and where their results go.
_LayerSlice = tuple[Tensor, Tensor | None, Tensor]


def _linear_into(part: _LayerSlice, weight: Tensor, bias: Tensor | None) -> None:
    """Write ``[rows, side] weight^T + bias`` into the results, a contiguous block."""
    x, side, out = part
    width, flat = x.shape[-1], out.view(-1, out.shape[-1])
    if side is None and bias is not None:
        torch.addmm(bias, x, weight.t(), out=flat)
        return
    torch.mm(x.reshape(-1, width), weight[:, :width].t(), out=flat)
    if side is not None:
        out.add_(nn.functional.linear(side, weight[:, width:], bias)[:, None])


def _batched_linear(x: Tensor, side: Tensor | None, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``[x, side] weights_i^T + bias`` for each of n equal parts, shaped like ``x``."""
    parts, width = len(weights), x.shape[-1]
    shape = (*x.shape[:-1], weights.shape[1])
    flat, across = x.reshape(parts, -1, width), weights.transpose(1, 2)
    if side is None:
        product = torch.bmm(flat, across)
        return (product if bias is None else product + bias).view(shape)
    out = torch.bmm(flat, across[:, :width]).view(shape)
    both = torch.bmm(side.reshape(parts, -1, side.shape[-1]), across[:, width:])
    if bias is not None:
        both = both + bias
    return out + both.view(len(x), 1, *shape[2:])
