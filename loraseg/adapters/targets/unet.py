"""The attention projections of a diffusion UNet, to which generator adapters are applied.

A projection is one linear layer ``...attn{1,2}.to_q | to_k | to_v | to_out.0`` of diffusers'
``Attention``. ``is_cross_attention`` of the module decides whether it attends to text: with
``only_cross_attention``, ``attn1`` of a transformer block does too.
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
# In model order.
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
        cross: Whether the module attends to text.
        part: Query, key, value or output.
        factor: Side of the latent divided by the side of the block's feature map: 1, 2, 4, 8.
        d_in: Width of the input.
        d_out: Width of the output.
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
        # MatchMask (CVPR 2026): cross-attention of the high-resolution blocks. The paper gives
        # neither layers nor rank; the two finest resolutions at rank 16 have its 0.7 M parameters.
        "matchmask": lambda projection: projection.cross and projection.factor <= 2,
    }
)


def attention_projections(unet: nn.Module) -> tuple[Projection, ...]:
    """Return the projections of a UNet in model order; parameters may be on the meta device.

    A layer wrapped by an adapter is reported under its own name.

    Raises:
        AdapterMismatchError: The model has no projection, or no down, mid and up blocks.
    """
    factors = _downsampling_factors(unet)
    projections = tuple(
        projection
        for block, factor in factors.items()
        for attention, module in unet.get_submodule(block).named_modules(prefix=block)
        if hasattr(module, "is_cross_attention")
        for projection in _projections_in(module, attention, block, factor)
    )
    if not projections:
        raise AdapterMismatchError(
            f"{type(unet).__name__} has no attention projection; expected a UNet with "
            f"cross-attention, such as diffusers' UNet2DConditionModel"
        )
    return projections


def select_projections(unet: nn.Module, rule: str) -> tuple[str, ...]:
    """Return the names of the projections that a rule selects, in model order.

    Args:
        unet: The UNet.
        rule: A key of :data:`SELECTION_RULES`.

    Raises:
        ConfigError: The rule is unknown.
        AdapterMismatchError: The rule selects no projection of the UNet.
    """
    if rule not in SELECTION_RULES:
        raise ConfigError(
            f"projections: unknown rule {rule!r} (known: {', '.join(SELECTION_RULES)})"
        )
    selects = SELECTION_RULES[rule]
    names = tuple(p.name for p in attention_projections(unet) if selects(p))
    if not names:
        raise AdapterMismatchError(
            f"projections: rule {rule!r} selects none of {type(unet).__name__}'s projections"
        )
    return names


def alpha_modules(unet: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return the cross-attention modules that contain a selected projection, in model order.

    These modules get an alpha layer of c + 1 parameters, with c the width of the query input
    (MatchMask's layer-adaptive fusion, :class:`~loraseg.synth.region_attention.RegionControl`).

    Args:
        unet: The UNet.
        names: Names of the selected layers; other layers than projections of cross-attention are
            ignored.

    Raises:
        AdapterMismatchError: The UNet has no module of one of the names.
    """
    modules = dict(unet.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise AdapterMismatchError(
            f"selected layers: {type(unet).__name__} has no module {unknown[0]!r} "
            f"({len(unknown)} of {len(names)} are unknown)"
        )
    selected = set(names)
    owners = {
        projection.attention: None
        for projection in attention_projections(unet)
        if projection.cross and projection.name in selected
    }
    return tuple(owners)


def _downsampling_factors(unet: nn.Module) -> dict[str, int]:
    """Return the downsampling factor of each block by name, in model order."""
    model: Any = unet
    factors: dict[str, int] = {}
    factor = 1
    try:
        for index, block in enumerate(model.down_blocks):
            factors[f"down_blocks.{index}"] = factor
            factor *= 2 if getattr(block, "downsamplers", None) else 1
        mid_factor = factor
        for index, block in enumerate(model.up_blocks):
            factors[f"up_blocks.{index}"] = factor
            factor //= 2 if getattr(block, "upsamplers", None) else 1
    except (AttributeError, TypeError) as error:
        raise AdapterMismatchError(
            f"{type(unet).__name__} has no down_blocks and up_blocks; expected a UNet such as "
            f"diffusers' UNet2DConditionModel"
        ) from error
    if isinstance(getattr(unet, "mid_block", None), nn.Module):
        factors["mid_block"] = mid_factor
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
