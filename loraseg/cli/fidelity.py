"""``loraseg synth fidelity URI --real FOLDER``: how near synthetic images come to real ones."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from loraseg.cli.console import print_line, print_table

if TYPE_CHECKING:
    from loraseg.evaluate.fidelity.run import FidelityMetric, FidelityReport

__all__ = ["add_fidelity"]

_DESCRIPTIONS = {
    "cmmd": "CMMD x 1000, middle square; 0 is best",
    "cmmd_no_crop": "CMMD x 1000, whole frame; 0 is best",
    "fid": "Frechet distance in CLIP's space; 0 is best",
    "coverage_of_real": "share of real images with a synthetic one near",
    "coverage_of_synthetic": "share of synthetic images with a real one near",
    "clip_score": "100 cos of image and prompt",
    "nearest_real": "median distance to the nearest real image",
    "copies": "share nearer to a real image than real ones to each other",
    "sibling_distance": "mean 1 - cos between images of one mask",
    "real_distance": "mean 1 - cos between any two real images",
}


def add_fidelity(commands: Any) -> None:
    """Add the command to the parser of ``loraseg synth``."""
    parser = commands.add_parser(
        "fidelity",
        help="compare a synthetic dataset's images with real ones",
        description="Figures hold for one encoder and one number of images: compare them only "
        "where both are the same.",
    )
    parser.add_argument("uri", metavar="URI", help="of the synthetic dataset")
    parser.add_argument("--real", required=True, metavar="FOLDER", help="dataset folder or URI")
    parser.add_argument(
        "--split",
        default="train",
        help="of the real images; copies are looked for in it; default: %(default)s",
    )
    parser.add_argument(
        "--encoder",
        default="miniature",
        metavar="CLIP",
        help="such as ViT-L-14-336/openai, that of CMMD in papers; default: %(default)s",
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
            f"perhaps a copy: {suspect.pair_id[:12]} of {suspect.real} "
            f"(distance {suspect.distance:.4f})"
        )


def _row(name: str, figure: "FidelityMetric") -> tuple[str, ...]:
    value = "-" if figure.value is None else f"{figure.value:.4f}"
    counts = (str(figure.real or "-"), str(figure.synthetic or "-"))
    return name, value, *counts, _DESCRIPTIONS[name], figure.encoder
