"""``loraseg segment IMAGE... --classes "road, car"``, on this machine or with an endpoint."""

import argparse
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraseg.cli.console import print_error
from loraseg.cli.inputs import check_files, endpoint_token, parse_classes, split_names
from loraseg.errors import ConfigError, LorasegError

if TYPE_CHECKING:
    from loraseg.cli.segment_output import SegmentWriter
    from loraseg.data.labels import LabelSpace
    from loraseg.inference.config import AdaptiveSegmenterConfig
    from loraseg.inference.request import SegmentResult
    from loraseg.tensor_types import ndarray

__all__ = ["add"]

_MAP_NAMES = ("confidence", "entropy")
# Options that an endpoint sets for all its clients. None takes the default of the config.
_LOCAL_OPTIONS = ("base", "encoder", "precision", "sliding")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "segment",
        help="segment images with the adapters nearest to each of them",
        description="Writes NAME.png (class ids with a palette), NAME_overlay.png and NAME.json "
        "(which adapters were used, their weights and distances) for every image.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG or JPEG files")
    parser.add_argument(
        "--classes", required=True, metavar="NAMES", help='class names, e.g. "road, car, sky"'
    )
    parser.add_argument(
        "--library", metavar="URI", help="adapter library; with --endpoint, its name there"
    )
    parser.add_argument("--out", default="segmented", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--top-k", type=int, metavar="K", help="number of adapters per image")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="TAU",
        help="softmax temperature of the adapter weights",
    )
    parser.add_argument(
        "--mode",
        choices=("fused", "uniform", "base"),
        default="fused",
        help="nearest adapters, all adapters with equal weights, or none; default: %(default)s",
    )
    parser.add_argument(
        "--maps",
        default="",
        metavar="NAMES",
        help='"confidence, entropy": also write NAME_confidence.png and NAME_entropy.png (grey)',
    )
    parser.add_argument(
        "--tiling",
        choices=("auto", "never", "always"),
        default="auto",
        help="cut images into overlapping tiles: large images, none, or all; default: %(default)s",
    )
    local = parser.add_argument_group("on this machine")
    local.add_argument("--base", metavar="BASE", help="frozen segmenter; default: miniature")
    local.add_argument(
        "--encoder",
        metavar="CLIP",
        help="CLIP model that the library is indexed with; default: miniature",
    )
    local.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32")
    local.add_argument(
        "--sliding", action="store_const", const=True, help="also segment overlapping windows"
    )
    remote = parser.add_argument_group("with an endpoint")
    remote.add_argument("--endpoint", metavar="URL", help="e.g. https://segment.example.org")
    remote.add_argument(
        "--token-file", metavar="FILE", help="file with the bearer token of the endpoint"
    )
    parser.set_defaults(command=_segment)


def _segment(arguments: argparse.Namespace) -> int:
    label_space = parse_classes(arguments.classes)
    paths = check_files(arguments.images, "image", "results")
    token = endpoint_token(arguments)
    arguments.maps = _parse_maps(arguments.maps)
    if arguments.endpoint is None:
        return _segment_locally(arguments, label_space, paths)
    if given := [name for name in _LOCAL_OPTIONS if getattr(arguments, name) is not None]:
        raise ConfigError(f"--{given[0]}: the endpoint decides this for all of its clients")
    from loraseg.cli.segment_online import segment_online

    return segment_online(arguments, label_space, paths, token)


def _segment_locally(
    arguments: argparse.Namespace, label_space: "LabelSpace", paths: list[Path]
) -> int:
    from loraseg.cli.segment_output import SegmentWriter
    from loraseg.data.images import read_image
    from loraseg.inference.loading import build_segmenter

    config = _config(arguments)
    segmenter = build_segmenter(config)
    settings = config.adaptive_settings(config.mode)
    output = SegmentWriter(Path(arguments.out), label_space, settings)
    in_model: deque[tuple[Path, ndarray]] = deque()
    failures: list[LorasegError] = []

    def decode_images() -> "Iterator[list[ndarray]]":
        for path in paths:
            try:
                image = read_image(path)
            except LorasegError as error:
                print_error(error)
                failures.append(error)
                continue
            in_model.append((path, image))
            yield [image]

    for outcome in segmenter.segment_stream(
        decode_images(), label_space.names, maps=arguments.maps, tiling=arguments.tiling
    ):
        path, image = in_model.popleft()
        try:
            if isinstance(outcome, LorasegError):
                raise outcome
            _write(output, path, image, outcome[0])
        except LorasegError as error:
            # An error of one image must not stop the others.
            print_error(error)
            failures.append(error)
    return int(bool(failures))


def _write(output: "SegmentWriter", path: Path, image: "ndarray", result: "SegmentResult") -> None:
    maps = {"confidence": result.confidence, "entropy": result.entropy}
    output.write(path, image, result.label_map, maps, result.explanation.to_json())


def _parse_maps(text: str) -> tuple[str, ...]:
    if unknown := set(split_names(text)) - set(_MAP_NAMES):
        raise ConfigError(f"--maps: got {sorted(unknown)[0]!r}, expected {' or '.join(_MAP_NAMES)}")
    return tuple(name for name in _MAP_NAMES if name in split_names(text))


def _config(arguments: argparse.Namespace) -> "AdaptiveSegmenterConfig":
    from loraseg.inference.config import AdaptiveSegmenterConfig

    if arguments.library is None and arguments.mode != "base":
        raise ConfigError("--library: expected the URI of a library, or --mode base for none")
    given = {name: getattr(arguments, name) for name in _LOCAL_OPTIONS}
    return AdaptiveSegmenterConfig(
        library=arguments.library,
        k=arguments.top_k,
        temperature=arguments.temperature,
        mode=arguments.mode,
        **{name: value for name, value in given.items() if value is not None},
    )
