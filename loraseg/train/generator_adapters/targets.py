"""The layers of a UNet that a generator recipe adapts, and the number of trained values."""

from torch import nn

from loraseg.adapters.targets.layer_report_io import find_layer_report
from loraseg.adapters.targets.selection import select_from_report
from loraseg.adapters.targets.unet import SELECTION_RULES, alpha_modules, select_projections
from loraseg.errors import AdapterMismatchError, ConfigError
from loraseg.storage import absolute_uri
from loraseg.train.generator_adapters.recipes import GeneratorRecipe

__all__ = [
    "absolute_targets",
    "attention_mix_modules",
    "count_generator_parameters",
    "generator_targets",
]


def generator_targets(unet: nn.Module, recipe: GeneratorRecipe) -> tuple[str, ...]:
    """Return the full names of the adapted linear layers; the UNet may be on the meta device.

    Raises:
        ConfigError: ``targets`` is neither a rule nor a layer report, or ``top`` and ``share`` do
            not fit it.
        IntegrityError: The report is damaged.
        AdapterMismatchError: The UNet has no such linear layer.
        StoreError: The store of the report cannot be reached.
    """
    targets, cut = recipe.targets, (recipe.top, recipe.share)
    by_report = isinstance(targets, str) and targets not in SELECTION_RULES
    if not by_report and cut != (None, None):
        raise ConfigError(
            f"top {recipe.top}, share {recipe.share}: expected null unless targets is a layer "
            "report"
        )
    if not isinstance(targets, str):
        names = targets
    elif by_report:
        names = _from_report(targets, recipe)
    else:
        names = select_projections(unet, targets)
    modules = dict(unet.named_modules())
    unknown = [name for name in names if not isinstance(modules.get(name), nn.Linear)]
    if unknown or len(set(names)) != len(names):
        raise AdapterMismatchError(
            f"targets: {type(unet).__name__} has no linear layer {unknown[0]!r} "
            f"({len(unknown)} of {len(names)} names)"
            if unknown
            else "targets: a layer is named twice"
        )
    return names


def attention_mix_modules(
    unet: nn.Module, recipe: GeneratorRecipe, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the attention modules of the adapted layers that get an attention-mix layer."""
    if recipe.fusion.mode == "off" or not recipe.draws.regions:
        return ()
    return alpha_modules(unet, names)


def count_generator_parameters(unet: nn.Module, recipe: GeneratorRecipe) -> tuple[int, int]:
    """Return the numbers of values of pairs and of attention-mix layers.

    The UNet may be on the meta device.

    Raises:
        LorasegError: As in :func:`generator_targets`.
    """
    names = generator_targets(unet, recipe)
    sizes = {name: unet.get_submodule(name).get_parameter("weight").shape for name in names}
    widths = [
        unet.get_submodule(f"{owner}.to_q").get_parameter("weight").shape[1]
        for owner in attention_mix_modules(unet, recipe, names)
    ]
    return recipe.rank * sum(sum(shape) for shape in sizes.values()), sum(widths) + len(widths)


def absolute_targets(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Return the targets with the path of a layer report made absolute."""
    if not isinstance(targets, str) or targets in SELECTION_RULES:
        return targets
    return absolute_uri(targets)


def _from_report(uri: str, recipe: GeneratorRecipe) -> tuple[str, ...]:
    report = find_layer_report(uri)
    if report is None:
        raise ConfigError(
            f"targets: got {uri!r}, which is neither a rule ({', '.join(SELECTION_RULES)}) nor a "
            "layer report"
        )
    if (recipe.top is None) == (recipe.share is None):
        raise ConfigError(
            f"targets {uri!r}: a layer report needs top or share, got top {recipe.top}, share "
            f"{recipe.share}"
        )
    return select_from_report(report, top=recipe.top, share=recipe.share)
