"""What an initialiser takes and returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import nn

from loraseg.tensor_types import Tensor

__all__ = ["InitialPairs", "Initialiser", "ParameterGroup"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """Pairs that share a learning rate.

    Attributes:
        modules: Names of the adapted layers.
        rate_factor: Multiplies the recipe's learning rate.
    """

    modules: tuple[str, ...]
    rate_factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialPairs:
    """Pairs before the first training step, in float32 on the device of their layers.

    Attributes:
        pairs: ``(down, up)`` by module name, of shapes (r, d_in) and (d_out, r).
        scale: Factor of every update: a layer computes ``W x + scale * up @ down @ x``.
        residual: Weights (d_out, d_in) by module name that replace the base's while training and
            inference, for methods that move a part of W into the pairs; empty if W stays.
        groups: Every module of ``pairs`` in exactly one group.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    residual: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    groups: tuple[ParameterGroup, ...]


@runtime_checkable
class Initialiser(Protocol):
    """A method that makes the initial pairs of an adapter."""

    def __call__(
        self, model: nn.Module, modules: Sequence[str], *, rank: int, alpha: float, seed: int
    ) -> InitialPairs:
        """Return the initial pairs of linear layers.

        Args:
            model: The frozen base; not changed.
            modules: Full names of its linear layers, in model order.
            rank: r of every pair.
            alpha: The scale is ``alpha / rank``.
            seed: Seed of the random streams, one per module.
        """
        ...
