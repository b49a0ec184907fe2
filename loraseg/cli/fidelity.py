"""``loraseg synth fidelity URI --real FOLDER``: compare synthetic images with real ones."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from loraseg.cli.console import print_line, print_table

if TYPE_CHECKING:
    from loraseg.evaluate.fidelity.run import FidelityMetric, FidelityReport

__all__ = ["add_fidelity"]

_DESCRIPTIONS = {
    "cmmd": "CMMD x 1000, centre crop; 0 is best",
    "cmmd_no_crop": "CMMD x 1000, whole frame; 0 is best",
    "fid": "Frechet distance in CLIP's space; 0 is best",
    "coverage_of_real": "share of real images with a synthetic image nearby",
    "coverage_of_synthetic": "share of synthetic images with a real image nearby",
    "clip_score": "100 x cosine similarity of image and prompt",
    "nearest_real": "median distance to the nearest real image",
    "copies": "share closer to a real image than real images to each other",
    "sibling_distance": "mean cosine distance between images of one mask",
    "real_distance": "mean cosine distance between two real images",
}


def add_fidelity(commands: Any) -> None:
    """Add the command to the parser of ``loraseg synth``."""
    parser = commands.add_parser(
        "fidelity",
        help="compare the images of a synthetic dataset with real ones",
        description="Values depend on the encoder and the number of images: compare values only if "
        "both are equal.",
    )
    parser.add_argument("uri", metavar="URI", help="synthetic dataset")
    parser.add_argument("--real", required=True, metavar="FOLDER", help="dataset folder or URI")
    parser.add_argument(
        "--split",
        default="train",
        help="split of the real images, also searched for copies; default: %(default)s",
    )
    parser.add_argument(
        "--encoder",
        default="miniature",
        metavar="CLIP",
        help="e.g. ViT-L-14-336/openai, the encoder of published CMMD values; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_fidelity)


def _fidelity(arguments: argparse.Namespace) -> int:
    from loraseg.backbones.clip import load_clip
    from loraseg.backbones.device import best_device
    from loraseg.data.readers.opening import open_dataset
    from loraseg.data.shards.reader import ShardDataset
    from loraseg.evaluate.fidelity.run import measure_fidelity

    dataset = ShardDataset.open(arguments.uri)
    real = open_dataset(arguments.real)
    encoder = load_clip(arguments.encoder)
    encoder.model.to(best_device())
    result = measure_fidelity(dataset, real, arguments.split, encoder)
    if arguments.json:
        sys.stdout.write(result.to_json())
    else:
        _print_figures(result)
    return 0


def _print_figures(result: "FidelityReport") -> None:
    print_table(
        [
            ("FIGURE", "VALUE", "REAL", "SYNTHETIC", "MEANING", "ENCODER"),
            *(_row(name, result.figures[name]) for name in _DESCRIPTIONS),
        ]
    )
    for suspect in result.suspects:
        print_line(
            f"possible copy: {suspect.pair_id[:12]} of {suspect.real} "
            f"(distance {suspect.distance:.4f})"
        )


def _row(name: str, figure: "FidelityMetric") -> tuple[str, ...]:
    value = "-" if figure.value is None else f"{figure.value:.4f}"
    counts = (str(figure.real or "-"), str(figure.synthetic or "-"))
    return name, value, *counts, _DESCRIPTIONS[name], figure.encoder
