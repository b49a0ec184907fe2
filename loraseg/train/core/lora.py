"""LoRA pairs as parameters, and how a frozen model computes with them."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.init import INITIALISERS, ParameterGroup
from loraseg.errors import AdapterMismatchError, ConfigError
from loraseg.tensor_types import Tensor

__all__ = ["TrainablePairs", "apply_lora", "freeze", "init_pairs"]


@dataclasses.dataclass(frozen=True, slots=True)
class TrainablePairs:
    """LoRA pairs as parameters.

    Attributes:
        pairs: ``(down, up)`` by module name, of shapes (r, d_in) and (d_out, r).
        scale: Factor of every update.
        groups: Every module in one group of a learning rate.
    """

    pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
    scale: float
    groups: tuple[ParameterGroup, ...]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters by a name that is stable between runs."""
        named: dict[str, nn.Parameter] = {}
        for module, (down, up) in self.pairs.items():
            named[f"{module}.lora_A"], named[f"{module}.lora_B"] = down, up
        return named

    def optimiser_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups with their peak learning rates."""
        return [
            {
                "params": [side for module in group.modules for side in self.pairs[module]],
                "lr": learning_rate * group.rate_factor,
                "weight_decay": weight_decay,
            }
            for group in self.groups
        ]

    def detached(self) -> dict[str, LoraPair]:
        """Return the pairs as they are now, on the CPU."""
        return {
            module: LoraPair(down.detach().cpu().clone(), up.detach().cpu().clone(), self.scale)
            for module, (down, up) in self.pairs.items()
        }


def init_pairs(
    model: nn.Module,
    modules: Sequence[str],
    *,
    rank: int,
    alpha: float,
    seed: int,
    method: str = "lora",
) -> TrainablePairs:
    """Return trainable pairs for linear layers of a model, on their devices, in float32.

    Args:
        model: The base.
        modules: Full names of its linear layers.
        rank: r of every pair.
        alpha: The scale is ``alpha / rank``.
        seed: Seed of the random streams.
        method: A key of :data:`~loraseg.adapters.init.INITIALISERS`.

    Raises:
        ConfigError: The method changes the weights of the base, which training does not support.
    """
    initial = INITIALISERS[method](model, modules, rank=rank, alpha=alpha, seed=seed)
    if initial.residual:
        raise ConfigError(f"initialiser {method!r} changes the base's weights; expected none")
    pairs = {
        module: (nn.Parameter(down), nn.Parameter(up))
        for module, (down, up) in initial.pairs.items()
    }
    return TrainablePairs(pairs, initial.scale, initial.groups)


@contextmanager
def freeze(model: nn.Module, *, training: bool) -> Generator[None, None, None]:
    """Freeze all parameters of a model; restore its mode and ``requires_grad`` on exit.

    Args:
        model: The base.
        training: The mode of the model inside the block.
    """
    mode = model.training
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False).train(training)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        model.train(mode)


@contextmanager
def apply_lora(model: nn.Module, pairs: TrainablePairs) -> Generator[None, None, None]:
    """Add the pairs' updates to every forward pass inside the block; backward may run after it.

    Only the ``forward`` attribute of the layers is replaced, not the layers or their weights.
    Entering and leaving takes microseconds, so several sets of pairs can alternate on one model.

    Raises:
        AdapterMismatchError: Pairs are applied to one of the layers already.
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
    """Return a replacement of ``layer.forward``.

    ``x`` is (..., d_in). A guided layer takes ``guide`` as well, the shared last columns of its
    input, see :mod:`loraseg.segment.open_vocabulary.catseg.guided`.
    """

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
    """``W x + b + scale B A x`` with W and b frozen.

    Autograd over the plain formula makes eight more passes over arrays of the output's size: it
    casts the input twice, and scales and adds the second product separately, forward and backward.
    Here both products accumulate in one array each way, and the scale multiplies the small A.
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
        # Not a view: callers may modify the output in place, as after a plain linear layer.
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
