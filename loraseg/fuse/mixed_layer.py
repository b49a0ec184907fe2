"""One linear layer with mixes applied: each part of its input uses its own mix."""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from loraseg.adapters.packed import WeightShape
from loraseg.errors import StageError
from loraseg.fuse.merging import MergeTable
from loraseg.tensor_types import Float, Tensor

__all__ = ["MERGED_ATTRIBUTE", "BatchPlan", "MixSegment", "MixedLayer", "require_unmodified"]

# :func:`loraseg.fuse.merged.merged` sets this attribute on a layer whose weight holds a mix.
MERGED_ATTRIBUTE = "merged_mix"

# Largest merged weight (in values) that is cached: the aggregator's layers, not those of towers.
_MAX_CACHED_WEIGHT_SIZE = 2**17


@dataclass(frozen=True, slots=True)
class MixSegment:
    """The parts from ``start`` to before ``stop``, with one mix; ``slot`` None is the base."""

    start: int
    stop: int
    slot: int | None


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How the leading axis of every layer's input is split between mixes.

    Attributes:
        parts: Number of equal parts.
        digests: Digest of the mix in each slot.
        segments: They cover the parts in order. Unused if ``batched``, where part i has slot i.
        batched: Whether all parts run together as batched products.
        table: When to merge.
    """

    parts: int
    digests: tuple[str | None, ...]
    segments: tuple[MixSegment, ...]
    batched: bool
    table: MergeTable


class MixedLayer:
    """Replaces the ``forward`` of one linear layer; the layer's weight is only read."""

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
        """Replace the layer's ``forward`` until :meth:`detach`; ``scratch`` may be overwritten.

        Raises:
            StageError: Other adapters are in use on the layer.
        """
        require_unmodified(self.name, self.linear)
        self._plan, self._down, self._up, self._scratch = plan, down, up, scratch
        cached, weight = self._cached_weights, self.linear.weight
        self._cached_weights = {key: cached[key] for key in plan.digests if key in cached}
        if any((m.device, m.dtype) != (weight.device, weight.dtype) for m in cached.values()):
            self._cached_weights = {}  # the model was moved
        # An instance attribute, because a hook cannot skip the layer's own computation.
        self.linear.forward = self.forward  # pyright: ignore[reportAttributeAccessIssue]

    def detach(self) -> None:
        """Restore the layer's own ``forward``."""
        self.linear.__dict__.pop("forward", None)
        self._plan = None

    def forward(self, x: Tensor, guide: Tensor | None = None) -> Tensor:
        """Return the layer's output with each part's mix added to its weight.

        Args:
            x: (b, ..., d_in), b a multiple of the plan's parts; with a guide (b, s, ..., d).
            guide: (b, ..., a), shared along s; d + a = d_in.

        Returns:
            (b, ..., d_out), or (b, s, ..., d_out) with a guide.

        Raises:
            StageError: No plan is attached, or its parts do not divide b.
        """
        plan = self._plan
        if plan is None or x.shape[0] % plan.parts:
            raise StageError(
                f"layer {self.name}: got an input of shape {tuple(x.shape)}, expected "
                f"{plan.parts if plan else 'no'} equal parts along the first axis"
            )
        # With a guide (images, s, positions, d) and (images, positions, a), else (rows, d).
        if guide is None:
            rows, sides = x.reshape(-1, x.shape[-1]), None
        else:
            sides = guide.reshape(len(x), -1, guide.shape[-1])
            rows = x.reshape(len(x), x.shape[1], sides.shape[1], x.shape[-1])
        run = self._run_batched if plan.batched else self._run_segments
        return run(plan, rows, sides).view(*x.shape[:-1], self.shape[0])

    def _run_segments(self, plan: BatchPlan, rows: Tensor, sides: Tensor | None) -> Tensor:
        """Run one segment after the other, each writing into its slice of the output."""
        out = rows.new_empty(*rows.shape[:-1], self.shape[0])
        part_rows = len(rows) // plan.parts
        part_tokens = rows.shape[:-1].numel() // plan.parts

        def layer_slice(start: int, stop: int) -> _LayerSlice:
            span = slice(start * part_rows, stop * part_rows)
            return rows[span], None if sides is None else sides[span], out[span]

        def is_merged(segment: MixSegment) -> bool:
            tokens = part_tokens * (segment.stop - segment.start)
            return segment.slot is not None and plan.table.should_merge(self.shape, tokens)

        # Neighbouring segments that use the weight itself share one large product.
        for merged, run in groupby(plan.segments, is_merged):
            segments = list(run)
            if merged:
                for segment in segments:
                    weight = self._merged_weight(segment)
                    _linear_into(layer_slice(segment.start, segment.stop), weight, self.linear.bias)
                continue
            whole = layer_slice(segments[0].start, segments[-1].stop)
            _linear_into(whole, self.linear.weight, self.linear.bias)
            for segment in segments:
                self._add_low_rank(segment, layer_slice(segment.start, segment.stop))
        return out

    def _merged_weight(self, segment: MixSegment) -> Tensor:
        """Return ``W + up^T down``; small weights are cached while their mix is in use.

        The aggregator calls its layers once per chunk of classes.
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
        """Run all parts together; part i uses slot i."""
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
    """Check that no adapter is merged into a layer and that its ``forward`` is its own.

    Raises:
        StageError: Adapters are in use on the layer.
    """
    if vars(linear).keys() & {"forward", MERGED_ATTRIBUTE}:
        raise StageError(f"layer {name}: other adapters are in use on it; leave them first")


# Rows, their guides (second input) and the output slice.
_LayerSlice = tuple[Tensor, Tensor | None, Tensor]


def _linear_into(part: _LayerSlice, weight: Tensor, bias: Tensor | None) -> None:
    """Write ``[rows, guide] weight^T + bias`` into the output slice, which is contiguous."""
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
