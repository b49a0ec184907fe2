"""The attention projections of a diffusion UNet, which adapters of the generator change.

A projection is one linear layer ``...attn{1,2}.to_q | to_k | to_v | to_out.0`` (methods 0.1).
Whether an attention module looks at text is read from its ``is_cross_attention``: with
``only_cross_attention`` the first one of a transformer block does so too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, cast

from torch import nn

from loraseg.errors import AdapterMismatchError, ConfigError

__all__ = [
    "PROJECTION_PARTS",
    "SELECTION_RULES",
    "Projection",
    "ProjectionPart",
    "alpha_modules",
    "attention_projections",
    "select_projections",
]

ProjectionPart = Literal["q", "k", "v", "out"]
# In the order in which the modules stand in the model.
PROJECTION_PARTS: Mapping[str, ProjectionPart] = MappingProxyType(
    {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}
)


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear layer of an attention module.

    Attributes:
        name: Full dotted module name.
        attention: Name of the attention module that holds it.
        block: The UNet's block: ``down_blocks.0``, ``mid_block``, ``up_blocks.3``.
        cross: Whether the module looks at the text.
        part: Query, key, value or output.
        factor: Side of the latent over the side at which the block works: 1, 2, 4, 8.
        d_in: Width of its input.
        d_out: Width of its output.
    """

    name: str
    attention: str
    block: str
    cross: bool
    part: ProjectionPart
    factor: int
    d_in: int
    d_out: int


SELECTION_RULES: Mapping[str, Callable[[Projection], bool]] = MappingProxyType(
    {
        "all": lambda projection: True,
        "cross": lambda projection: projection.cross,
        "self": lambda projection: not projection.cross,
        # Methods b.4: cross attention of the two finest resolutions, 0.7 M values at rank 16.
        "matchmask": lambda projection: projection.cross and projection.factor <= 2,
    }
)


def attention_projections(unet: nn.Module) -> tuple[Projection, ...]:
    """Return the projections of a UNet in model order; the meta device will do.

    Layers that carry an adapter count by their own names.

    Raises:
        AdapterMismatchError: The model has none, or is not built of down, mid and up blocks.
    """
    factors = _downsampling_factors(unet)
    found = tuple(
        projection
        for block, factor in factors.items()
        for attention, module in unet.get_submodule(block).named_modules(prefix=block)
        if hasattr(module, "is_cross_attention")
        for projection in _projections_in(module, attention, block, factor)
    )
    if not found:
        raise AdapterMismatchError(
            f"{type(unet).__name__} has no attention projection; expected a UNet with cross "
            f"attention, such as diffusers' UNet2DConditionModel"
        )
    return found


def select_projections(unet: nn.Module, rule: str) -> tuple[str, ...]:
    """Return the names of the projections that a rule selects, in model order.

    Args:
        unet: The UNet.
        rule: A key of :data:`SELECTIONS`.

    Raises:
        ConfigError: There is no such rule.
        AdapterMismatchError: The UNet has no projection that the rule selects.
    """
    if rule not in SELECTION_RULES:
        raise ConfigError(
            f"projections: unknown rule {rule!r} (known: {', '.join(SELECTION_RULES)})"
        )
    selects = SELECTION_RULES[rule]
    names = tuple(found.name for found in attention_projections(unet) if selects(found))
    if not names:
        raise AdapterMismatchError(
            f"projections: rule {rule!r} selects none of {type(unet).__name__}'s projections"
        )
    return names


def alpha_modules(unet: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return the cross attention modules that hold a selected projection, in model order.

    They are the ones that get an alpha layer of C + 1 values (methods b.2), C the query's width.

    Args:
        unet: The UNet.
        names: Names of selected layers; those that are no projections of cross attention hold no
            alpha layer.

    Raises:
        AdapterMismatchError: The UNet has no module of such a name.
    """
    modules = dict(unet.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise AdapterMismatchError(
            f"selected layers: {type(unet).__name__} has no {unknown[0]!r} "
            f"({len(unknown)} of {len(names)} are unknown)"
        )
    selected = set(names)
    held = {
        found.attention: None
        for found in attention_projections(unet)
        if found.cross and found.name in selected
    }
    return tuple(held)


def _downsampling_factors(unet: nn.Module) -> dict[str, int]:
    """Return block name -> latent side / block side, in model order."""
    parts: Any = unet
    factors: dict[str, int] = {}
    factor = 1
    try:
        for index, block in enumerate(parts.down_blocks):
            factors[f"down_blocks.{index}"] = factor
            factor *= 2 if getattr(block, "downsamplers", None) else 1
        middle = factor
        for index, block in enumerate(parts.up_blocks):
            factors[f"up_blocks.{index}"] = factor
            factor //= 2 if getattr(block, "upsamplers", None) else 1
    except (AttributeError, TypeError) as error:
        raise AdapterMismatchError(
            f"{type(unet).__name__} is not built of down_blocks and up_blocks; expected a UNet "
            f"such as diffusers' UNet2DConditionModel"
        ) from error
    if isinstance(getattr(unet, "mid_block", None), nn.Module):
        factors["mid_block"] = middle
    order = [name.partition(".")[0] for name, _ in unet.named_children()]
    return dict(sorted(factors.items(), key=lambda item: order.index(item[0].partition(".")[0])))


def _projections_in(
    module: nn.Module, attention: str, block: str, factor: int
) -> Iterator[Projection]:
    for suffix, part in PROJECTION_PARTS.items():
        name, _, index = suffix.partition(".")
        layer: Any = getattr(module, name, None)
        if index and layer is not None:
            layer = layer[int(index)]
        if layer is None:
            continue
        yield Projection(
            name=f"{attention}.{suffix}",
            attention=attention,
            block=block,
            cross=bool(cast(Any, module).is_cross_attention),
            part=part,
            factor=factor,
            d_in=int(layer.in_features),
            d_out=int(layer.out_features),
        )
