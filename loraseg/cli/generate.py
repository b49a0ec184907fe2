"""``loraseg generate MASK... --k 5``: generate images from masks."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraseg.cli.inputs import check_files, parse_classes
from loraseg.errors import ConfigError

if TYPE_CHECKING:
    from loraseg.data.labels import LabelSpace
    from loraseg.inference.generation import LoadedGenerator
    from loraseg.synth.generator import Generator
    from loraseg.synth.sampling import SamplingConfig

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="generate images from masks",
        description="Writes NAME_0.png ... (images), NAME_0_label.png ... (class ids with a "
        "palette) and NAME_0.json ... (lineage) for every mask, and sheet.png with the masks and "
        "their images side by side.",
    )
    parser.add_argument("masks", nargs="+", metavar="MASK", help="PNG files of class ids")
    parser.add_argument(
        "--classes",
        metavar="NAMES",
        help='classes.json, or "road, car, sky" in the order of the ids; default: the classes of '
        "the first adapter that lists them",
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
        help="weight of each adapter, in the same order; default: 1",
    )
    parser.add_argument("--out", default="generated", metavar="DIR", help="default: %(default)s")
    _add_sampling(parser.add_argument_group("sampling"))
    parser.set_defaults(command=_generate)


def _add_sampling(group: Any) -> None:
    group.add_argument("--k", type=int, metavar="K", help="images per mask; default: 5")
    group.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help='e.g. "{classes} in heavy fog"; default: "{classes}"',
    )
    group.add_argument("--steps", type=int, metavar="N", help="sampler steps; default: 50")
    group.add_argument(
        "--guidance", type=float, metavar="S", help="classifier-free guidance scale; default: 2"
    )
    group.add_argument("--seed", type=int, metavar="N", help="default: 0")
    group.add_argument(
        "--scheduler", metavar="NAME", help="pndm, ddim, euler, dpm++, ... or a diffusers class"
    )
    group.add_argument("--size", metavar="HxW", help="image size; default: the size of the mask")
    group.add_argument("--batch", type=int, metavar="N", help="images per batch; default: 8")
    group.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32")
    group.add_argument(
        "--no-regions", action="store_true", help="no region attention: only the prompt is used"
    )


def _generate(arguments: argparse.Namespace) -> int:
    config = _sampling_config(arguments)
    paths = _check_masks(arguments.masks, Path(arguments.out), config.images)
    weights = _weights(arguments)
    from loraseg.cli.generate_output import GenerateWriter
    from loraseg.data.masks import read_mask
    from loraseg.inference.generation import load_generator

    loaded = load_generator(arguments.base, arguments.adapter, weights=weights, sampling=config)
    label_space = _label_space(arguments.classes, loaded)
    masks = [(path.stem, read_mask(path, classes=len(label_space))) for path in paths]
    generator = _generator(loaded, label_space, arguments.prompt_template)
    output = GenerateWriter(Path(arguments.out), label_space, generator.digest)
    total = len(masks) * config.images
    started = time.monotonic()
    for count, image in enumerate(generator.generate(masks), 1):
        output.write(image)
        _print_progress(count, total, time.monotonic() - started)
    output.write_sheet(dict(masks))
    return 0


def _generator(
    loaded: "LoadedGenerator", label_space: "LabelSpace", template: str | None
) -> "Generator":
    from loraseg.synth.conditioning import ConditioningConfig

    conditioning = ConditioningConfig()
    if template is not None:
        conditioning = replace(conditioning, template=template)
    return loaded.for_classes(label_space, conditioning)


def _sampling_config(arguments: argparse.Namespace) -> "SamplingConfig":
    from loraseg.synth.sampling import SamplingConfig

    options: dict[str, Any] = {
        "images": arguments.k,
        "size": _size(arguments.size),
        "regions": not arguments.no_regions,
        **{
            name: getattr(arguments, name)
            for name in ("steps", "guidance", "seed", "scheduler", "batch", "precision")
        },
    }
    return SamplingConfig(**{name: value for name, value in options.items() if value is not None})


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


def _label_space(text: str | None, loaded: "LoadedGenerator") -> "LabelSpace":
    if text is not None:
        return parse_classes(text, allow_file=True)
    if loaded.label_space is None:
        raise ConfigError(
            "--classes: expected the classes of the masks, since no adapter lists its classes"
        )
    return loaded.label_space


def _check_masks(masks: list[str], out: Path, images: int) -> list[Path]:
    """Check that the masks exist and that no output overwrites an output or a mask."""
    paths = check_files(masks, "mask", "images")
    from loraseg.cli.generate_output import SHEET, file_names

    inputs = {path.resolve() for path in paths}
    names = {SHEET, *(n for p in paths for k in range(images) for n in file_names(p.stem, k))}
    if overwritten := sorted(inputs & {(out / name).resolve() for name in names}):
        raise ConfigError(
            f"--out: {overwritten[0]} is a mask and would be overwritten; choose another folder"
        )
    return paths


def _print_progress(count: int, total: int, elapsed_s: float) -> None:
    left_s = elapsed_s / count * (total - count)
    line = f"{count}/{total} images, {elapsed_s:.0f} s, {left_s:.0f} s left"
    # A terminal shows one line that is updated; a log file gets one line per image.
    end = "\r" if sys.stderr.isatty() and count < total else "\n"
    sys.stderr.write(f"{line}{end}")
    sys.stderr.flush()
