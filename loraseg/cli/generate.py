"""``loraseg generate MASK... --k 5``: images that follow masks."""

import argparse
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraseg.cli.console import split_names
from loraseg.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from loraseg.backbones.diffusion import DiffusionBase
    from loraseg.data.labels import LabelSpace
    from loraseg.inference.generator_adapters import LoadedGeneratorAdapter
    from loraseg.synth.generator import Generator
    from loraseg.synth.sampling import SamplingConfig

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="make images that follow masks",
        description="Writes NAME_0.png ... (images), NAME_0_label.png ... (class ids with a "
        "palette) and NAME_0.json ... (where the pair comes from) for every mask, and sheet.png "
        "with the masks and their images side by side.",
    )
    parser.add_argument("masks", nargs="+", metavar="MASK", help="PNG files of class ids")
    parser.add_argument(
        "--classes",
        metavar="NAMES",
        help='classes.json, or "road, car, sky" in the order of the ids; default: those of the '
        "first adapter that knows its own",
    )
    parser.add_argument("--base", default="miniature", help="default: %(default)s")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="ADAPTER",
        help="folder of an adapter, or LIBRARY#NAME[@VERSION]; may be repeated",
    )
    parser.add_argument(
        "--weight",
        action="append",
        type=float,
        default=[],
        metavar="W",
        help="of each adapter, in their order; default: 1",
    )
    parser.add_argument("--out", default="generated", metavar="DIR", help="default: %(default)s")
    _add_sampling(parser.add_argument_group("how to sample"))
    parser.set_defaults(command=_generate)


def _add_sampling(group: Any) -> None:
    group.add_argument("--k", type=int, metavar="K", help="images of each mask; default: 5")
    group.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help='such as "{classes} in heavy fog"; default: "{classes}"',
    )
    group.add_argument("--steps", type=int, metavar="N", help="default: 50")
    group.add_argument("--guidance", type=float, metavar="S", help="default: 2")
    group.add_argument("--seed", type=int, metavar="N", help="default: 0")
    group.add_argument(
        "--scheduler", metavar="NAME", help="pndm, ddim, euler, dpm++, ... or a class of diffusers"
    )
    group.add_argument("--size", metavar="HxW", help="of the images; default: those of the masks")
    group.add_argument("--batch", type=int, metavar="N", help="images at once; default: 8")
    group.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32")
    group.add_argument(
        "--no-regions", action="store_true", help="let the prompt alone say what is in a mask"
    )


def _generate(arguments: argparse.Namespace) -> int:
    config = _sampling_config(arguments)
    paths = _check_masks(arguments.masks, Path(arguments.out), config.images)
    weights = _weights(arguments)
    from loraseg.backbones.device import best_device
    from loraseg.backbones.diffusion import load_diffusion
    from loraseg.cli.generate_output import GenerateWriter
    from loraseg.data.masks import read_mask
    from loraseg.inference.generator_adapters import load_generator_adapter
    from loraseg.synth.sampling import DTYPES

    base = load_diffusion(arguments.base, device=best_device(), dtype=DTYPES[config.precision])
    loaded = [
        load_generator_adapter(spec, base, weight=weight)
        for spec, weight in zip(arguments.adapter, weights, strict=True)
    ]
    label_space = _label_space(arguments.classes, loaded)
    masks = [(path.stem, read_mask(path, classes=len(label_space))) for path in paths]
    generator = _generator(base, label_space, loaded, arguments.prompt_template, config)
    output = GenerateWriter(Path(arguments.out), label_space, generator.digest)
    total = len(masks) * config.images
    started = time.monotonic()
    for count, made in enumerate(generator.generate(masks), 1):
        output.write(made)
        _print_progress(count, total, time.monotonic() - started)
    output.write_sheet(dict(masks))
    return 0


def _generator(
    base: "DiffusionBase",
    label_space: "LabelSpace",
    loaded: "list[LoadedGeneratorAdapter]",
    template: str | None,
    config: "SamplingConfig",
) -> "Generator":
    from loraseg.synth.conditioning import Conditioner, ConditioningConfig
    from loraseg.synth.generator import Generator

    conditioning = ConditioningConfig()
    if template is not None:
        conditioning = replace(conditioning, template=template)
    conditioner = Conditioner(base.tokenizers, label_space, conditioning)
    return Generator(base, conditioner, adapters=[one.adapter for one in loaded], config=config)


def _sampling_config(arguments: argparse.Namespace) -> "SamplingConfig":
    from loraseg.synth.sampling import SamplingConfig

    given: dict[str, Any] = {
        "images": arguments.k,
        "size": _size(arguments.size),
        "regions": not arguments.no_regions,
        **{
            name: getattr(arguments, name)
            for name in ("steps", "guidance", "seed", "scheduler", "batch", "precision")
        },
    }
    return SamplingConfig(**{name: value for name, value in given.items() if value is not None})


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, mark, width = text.lower().partition("x")
    if not mark or not height.isdecimal() or not width.isdecimal():
        raise ConfigError(f"--size: got {text!r}, expected HxW such as 512x768")
    return int(height), int(width)


def _weights(arguments: argparse.Namespace) -> list[float]:
    count = len(arguments.adapter)
    if len(arguments.weight) not in (0, count):
        raise ConfigError(
            f"--weight: got {len(arguments.weight)}, expected one for each of {count} adapters"
        )
    return arguments.weight or [1.0] * count


def _label_space(text: str | None, loaded: "list[LoadedGeneratorAdapter]") -> "LabelSpace":
    from loraseg.data.labels import LabelSpace, read_classes

    if text is None:
        known = [one.card.label_space for one in loaded if one.card and one.card.label_space]
        if not known:
            raise ConfigError(
                "--classes: expected the classes of the masks, since no adapter knows its own"
            )
        return LabelSpace(known[0])
    try:
        if text.endswith(".json") or Path(text).is_file():
            return read_classes(text)
        return LabelSpace(split_names(text))
    except DatasetError as error:
        raise ConfigError(f"--classes: {error}") from error


def _check_masks(masks: list[str], out: Path, images: int) -> list[Path]:
    """Refuse masks that are not there, and images that would take the name of another or a mask."""
    paths = [Path(mask) for mask in masks]
    if absent := [str(path) for path in paths if not path.is_file()]:
        raise ConfigError(f"no such mask: {', '.join(absent)}")
    for stem, count in Counter(path.stem for path in paths).items():
        if count > 1:
            raise ConfigError(f"{count} masks are called {stem!r}; their images would collide")
    from loraseg.cli.generate_output import SHEET, file_names

    inputs = {path.resolve() for path in paths}
    written = {SHEET, *(n for p in paths for k in range(images) for n in file_names(p.stem, k))}
    if lost := sorted(inputs & {(out / name).resolve() for name in written}):
        raise ConfigError(f"--out: {lost[0]} is a mask and would be overwritten; give another")
    return paths


def _print_progress(count: int, total: int, elapsed_s: float) -> None:
    left_s = elapsed_s / count * (total - count)
    line = f"{count}/{total} images, {elapsed_s:.0f} s, {left_s:.0f} s left"
    # On a terminal one line that changes, in a log file one line for every image.
    end = "\r" if sys.stderr.isatty() and count < total else "\n"
    sys.stderr.write(f"{line}{end}")
    sys.stderr.flush()
