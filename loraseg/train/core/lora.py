"""LoRA pairs that train: fresh ones, and how they act in a model that stays as it is."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from loraseg.adapters.adapter import LoraPair
from loraseg.errors import AdapterMismatchError
from loraseg.seeding import torch_generator
from loraseg.tensor_types import Tensor

__all__ = ["TrainablePairs", "apply_lora", "freeze", "init_lora"]


@dataclasses.dataclass(frozen=True, slots=True)
class TrainablePairs:
    """Parameters (down, up) by module name, and the scale that all of them share."""

    pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
    scale: float

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters by a name that is stable between runs."""
        named: dict[str, nn.Parameter] = {}
        for module, (down, up) in self.pairs.items():
            named[f"{module}.lora_A"], named[f"{module}.lora_B"] = down, up
        return named

    def detached(self) -> dict[str, LoraPair]:
        """Return the pairs as they are now, on the CPU."""
        return {
            module: LoraPair(down.detach().cpu().clone(), up.detach().cpu().clone(), self.scale)
            for module, (down, up) in self.pairs.items()
        }


def init_lora(
    model: nn.Module, modules: Sequence[str], *, rank: int, alpha: float, seed: int
) -> TrainablePairs:
    """Return new pairs for linear layers of a model, on its device, in float32.

    A starts as in LoRA's reference (uniform within 1 / sqrt(d_in)) from a stream of the module's
    own, B at zero, so that the pairs change nothing at first.
    """
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in modules:
        weight: Any = model.get_submodule(module).weight
        d_out, d_in = weight.shape
        start = torch.rand((rank, d_in), generator=torch_generator(seed, "lora", module))
        down = ((2 * start - 1) * d_in**-0.5).to(weight.device)
        up = torch.zeros((d_out, rank), device=weight.device)
        pairs[module] = nn.Parameter(down), nn.Parameter(up)
    return TrainablePairs(pairs, alpha / rank)


@contextmanager
def freeze(model: nn.Module, *, training: bool) -> Generator[None, None, None]:
    """Let no parameter of a model train; its mode and ``requires_grad`` come back at the end.

    Args:
        model: The base.
        training: The mode meanwhile.
    """
    mode = model.training
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False).train(training)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
        model.train(mode)


@contextmanager
def apply_lora(model: nn.Module, pairs: TrainablePairs) -> Generator[None, None, None]:
    """Let pairs act on every forward pass of a block; backward may run after it.

    The layers and their weights are not touched: only what a call of them does. Entering and
    leaving takes microseconds, so that several sets of pairs can take turns on one model.

    Raises:
        AdapterMismatchError: Other pairs act in one of the layers already.
    """
    layers: list[Any] = [model.get_submodule(module) for module in pairs.pairs]
    if any("forward" in vars(layer) for layer in layers):
        raise AdapterMismatchError("the model holds LoRA pairs already; expected the bare base")
    try:
        for layer, (down, up) in zip(layers, pairs.pairs.values(), strict=True):
            layer.forward = _adapted_forward(layer, down, up, pairs.scale)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _adapted_forward(layer: Any, down: Tensor, up: Tensor, scale: float) -> Callable[..., Tensor]:
    """Return what replaces ``layer.forward``; a second input is that of a guided layer."""

    def forward(x: Tensor, guide: Tensor | None = None) -> Tensor:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if guide is None:
            return _AdaptedLinear.apply(x, layer.weight, layer.bias, down, up, scale, dtype)  # pyright: ignore[reportReturnType]
        width = x.shape[-1]
        own, shared = layer.weight[:, :width], layer.weight[:, width:]
        y: Any = _AdaptedLinear.apply(x, own, None, down[:, :width], up, scale, dtype)
        more: Any = _AdaptedLinear.apply(
            guide, shared, layer.bias, down[:, width:], up, scale, dtype
        )
        return y.add_(more.unsqueeze(1))

    return forward


class _AdaptedLinear(torch.autograd.Function):
    """W x + b + scale B A x with W and b frozen.

    Autograd over the plain formula passes over arrays as large as the output eight times more: it
    casts the input twice, scales and adds the second product apart, and so again on the way back.
    Here both products meet in one array each way, and the scale is multiplied into the small A.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, down, up, scale, dtype = inputs
        tokens = x.reshape(-1, x.shape[-1]).to(dtype)
        weight, down, up = weight.to(dtype), (scale * down).to(dtype), up.to(dtype)
        hidden = nn.functional.linear(tokens, down)
        y = nn.functional.linear(tokens, weight, None if bias is None else bias.to(dtype))
        y.addmm_(hidden, up.t())
        ctx.save_for_backward(tokens, hidden, weight, down, up)
        ctx.scale, ctx.shape, ctx.dtype, ctx.pair_dtype = scale, x.shape, x.dtype, inputs[3].dtype
        # Not a view, so that callers may go on in place, as after a plain linear layer.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable's type
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, hidden, weight, down, up = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_hidden = grad @ up
        grad_up = (grad.t() @ hidden).to(ctx.pair_dtype)
        grad_down = (grad_hidden.t() @ tokens).to(ctx.pair_dtype) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_hidden, down).view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, grad_down, grad_up, None, None
