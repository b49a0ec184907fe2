"""``loraseg synth replay URI PAIR_ID...``: make images of a synthetic dataset again."""

import argparse
from pathlib import Path
from typing import Any

from loraseg.cli.console import print_line, write_files

__all__ = ["add_replay"]


def add_replay(actions: Any) -> None:
    """Add the action to the parser of ``loraseg synth``."""
    parser = actions.add_parser(
        "replay",
        help="make images again and compare them, bit by bit",
        description="Loads the generator that the dataset was begun with and makes the images of "
        "pairs again. Exit status 1 if one differs: on another processor, with other libraries or "
        "on a GPU the last bits may.",
    )
    parser.add_argument("uri", metavar="URI")
    parser.add_argument("pairs", nargs="+", metavar="PAIR_ID", help="the first digits do")
    parser.add_argument("--out", metavar="DIR", help="write the new images there")
    parser.set_defaults(command=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    from loraseg.batch.synthesize.replay import Replayer
    from loraseg.data.drawing import encode_png
    from loraseg.data.shards.reader import ShardDataset

    replay = Replayer(ShardDataset.open(arguments.uri))
    equal = 0
    for pair in arguments.pairs:
        found = replay(pair)
        equal += not found.differing_pixels
        name = found.row.pair_id or ""
        verdict = (
            f"{found.differing_pixels} pixels differ"
            if found.differing_pixels
            else "equal, bit by bit"
        )
        print_line(f"{name}  {verdict}")
        if arguments.out is not None:
            png = encode_png(found.image, optimize=False)
            write_files(Path(arguments.out), {f"{name[:16]}_replayed.png": png})
    print_line(f"{equal} of {len(arguments.pairs)} equal")
    return int(equal < len(arguments.pairs))
