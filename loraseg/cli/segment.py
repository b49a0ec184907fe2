"""``loraseg segment IMAGE... --library URI --classes "road, car"``."""

import argparse
import json
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraseg.cli.console import complain, names, say
from loraseg.errors import ConfigError, LorasegError, StoreError

if TYPE_CHECKING:
    from loraseg.data.labels import LabelSpace
    from loraseg.segment.adaptive import AdaptiveSegmenter, AdaptiveSettings, Segmentation
    from loraseg.tensor_types import ndarray

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "segment",
        help="segment images with the adapters nearest to each of them",
        description="Writes NAME.png (class ids with a palette), NAME_overlay.png and NAME.json "
        "(which adapters were used, their weights and distances) for every image.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG or JPEG files")
    parser.add_argument("--classes", required=True, metavar="NAMES", help='"road, car, sky"')
    parser.add_argument("--library", metavar="URI", help="adapter library")
    parser.add_argument("--out", default="segmented", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--base", default="miniature", help="default: %(default)s")
    parser.add_argument("--encoder", default="miniature", help="index CLIP; default: %(default)s")
    parser.add_argument("--top-k", type=int, metavar="K", help="adapters for an image")
    parser.add_argument("--temperature", type=float, metavar="TAU", help="sharpness of weights")
    parser.add_argument(
        "--mode",
        choices=("fused", "uniform", "base"),
        default="fused",
        help="nearest adapters, all adapters alike, or none; default: %(default)s",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s"
    )
    parser.add_argument("--sliding", action="store_true", help="overlapping windows")
    parser.set_defaults(command=_segment)


@dataclass(frozen=True, slots=True)
class _Picture:
    path: Path
    image: "ndarray"
    label_space: "LabelSpace"
    result: "Segmentation"


def _segment(arguments: argparse.Namespace) -> int:
    from loraseg.data.images import read_image

    label_space = _label_space(arguments.classes)
    paths = _distinct(arguments.images)
    settings = _settings(arguments)
    segmenter = _segmenter(arguments, settings)
    folder = Path(arguments.out)
    readable: deque[tuple[Path, ndarray]] = deque()
    failures: list[LorasegError] = []

    def decoded() -> "Iterator[list[ndarray]]":
        for path in paths:
            try:
                image = read_image(path)
            except LorasegError as error:
                complain(error)
                failures.append(error)
                continue
            readable.append((path, image))
            yield [image]

    for outcome in segmenter.segment_stream(decoded(), label_space.names):
        path, image = readable.popleft()
        try:
            if isinstance(outcome, LorasegError):
                raise outcome
            _write(folder, _Picture(path, image, label_space, outcome[0]), settings)
        except LorasegError as error:
            # One broken image must not cost the others.
            complain(error)
            failures.append(error)
            continue
        used = outcome[0].explanation
        parts = ", ".join(f"{part.name} {part.weight:.2f}" for part in used.adapters)
        say(f"{path} -> {folder / path.stem}.png  {parts or used.fallback or 'base alone'}")
    return int(bool(failures))


def _label_space(text: str) -> "LabelSpace":
    from loraseg.data.labels import LabelSpace
    from loraseg.errors import DatasetError

    try:
        return LabelSpace(names(text))
    except DatasetError as error:
        raise ConfigError(f"--classes: {error}") from error


def _distinct(images: list[str]) -> list[Path]:
    """Refuse images that are not there, and two whose results would have the same name."""
    paths = [Path(image) for image in images]
    if absent := [str(path) for path in paths if not path.is_file()]:
        raise ConfigError(f"no such image: {', '.join(absent)}")
    for stem, count in Counter(path.stem for path in paths).items():
        if count > 1:
            raise ConfigError(f"{count} images are called {stem!r}; their results would collide")
    return paths


def _settings(arguments: argparse.Namespace) -> "AdaptiveSettings":
    from loraseg.segment.adaptive import preset

    changes = {"mode": arguments.mode, "k": arguments.top_k, "temperature": arguments.temperature}
    named = {name: value for name, value in changes.items() if value is not None}
    return replace(preset(arguments.encoder), **named)


def _segmenter(arguments: argparse.Namespace, settings: "AdaptiveSettings") -> "AdaptiveSegmenter":
    from loraseg.engine.assemble import Wanted, equip
    from loraseg.segment.adaptive import AdaptiveSegmenter
    from loraseg.segment.predictor import Predictor

    if arguments.library is None and settings.mode != "base":
        raise ConfigError("--library: expected the URI of a library, or --mode base for none")
    equipment = equip(
        Wanted(
            library=arguments.library,
            base=arguments.base,
            encoder=arguments.encoder,
            precision=arguments.precision,
        )
    )
    predictor = Predictor(equipment.base, mode="sliding" if arguments.sliding else "plain")
    return AdaptiveSegmenter(predictor, equipment.encoder, equipment.pool, settings)


def _write(folder: Path, picture: _Picture, settings: "AdaptiveSettings") -> None:
    from loraseg.segment.render import encode_png, overlay_with_legend, palette_png

    labels, label_space = picture.result.label_map, picture.label_space
    shares = {name: float((labels == index).mean()) for index, name in enumerate(label_space.names)}
    explanation = {
        "image": str(picture.path),
        "shares": shares,
        "settings": asdict(settings),
        **picture.result.explanation.to_json(),
    }
    text = json.dumps(explanation, indent=1, ensure_ascii=False) + "\n"
    stem = picture.path.stem
    files = {
        f"{stem}.png": palette_png(labels, label_space),
        f"{stem}_overlay.png": encode_png(overlay_with_legend(picture.image, labels, label_space)),
        f"{stem}.json": text.encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise StoreError(f"{folder}: cannot write: {error.strerror}") from error
