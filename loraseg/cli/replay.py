"""``loraseg synth replay URI PAIR_ID...``: regenerate images of a synthetic dataset."""

import argparse
from pathlib import Path
from typing import Any

from loraseg.cli.console import print_line, write_files

__all__ = ["add_replay"]


def add_replay(actions: Any) -> None:
    """Add the action to the parser of ``loraseg synth``."""
    parser = actions.add_parser(
        "replay",
        help="generate images again and compare them bit by bit",
        description="Loads the generator of the dataset and generates the images of the pairs "
        "again. The exit status is 1 if an image differs; on a GPU, another processor or other "
        "library versions, the last bits may differ.",
    )
    parser.add_argument("uri", metavar="URI")
    parser.add_argument("pairs", nargs="+", metavar="PAIR_ID", help="id or its first digits")
    parser.add_argument("--out", metavar="DIR", help="write the new images to this folder")
    parser.set_defaults(command=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from loraseg.batch.synthesize.replay import Replayer
    from loraseg.data.drawing import encode_png
    from loraseg.data.shards.reader import ShardDataset

    replay = Replayer(ShardDataset.open(arguments.uri))
    equal = 0
    for pair in arguments.pairs:
        replayed = replay(pair)
        equal += not replayed.differing_pixels
        name = replayed.row.pair_id or ""
        verdict = (
            f"{replayed.differing_pixels} pixels differ"
            if replayed.differing_pixels
            else "equal, bit by bit"
        )
        print_line(f"{name}  {verdict}")
        if arguments.out is not None:
            png = encode_png(replayed.image, optimize=False)
            write_files(Path(arguments.out), {f"{name[:16]}_replayed.png": png})
    print_line(f"{equal} of {len(arguments.pairs)} equal")
    return int(equal < len(arguments.pairs))
