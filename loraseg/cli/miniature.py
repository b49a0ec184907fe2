"""``loraseg miniature write FOLDER``: domains of the miniature world as dataset folders."""

import argparse
from pathlib import Path
from typing import Any

from loraseg.cli.console import print_line
from loraseg.cli.inputs import split_names
from loraseg.errors import ConfigError

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    group = commands.add_parser("miniature", help="built-in miniature world, which needs no data")
    actions = group.add_subparsers(required=True, metavar="ACTION")
    write = actions.add_parser("write", help="write domains as dataset folders")
    write.add_argument("folder", metavar="FOLDER")
    write.add_argument("--domains", metavar="NAMES", help="comma-separated; default: all")
    write.add_argument(
        "--train",
        type=int,
        default=30,
        metavar="N",
        help="images of the split train; default: %(default)s",
    )
    write.add_argument(
        "--val",
        type=int,
        default=20,
        metavar="N",
        help="images of the split val; default: %(default)s",
    )
    write.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    write.set_defaults(command=_write)


def _write(arguments: argparse.Namespace) -> int:
    from loraseg.miniature.world.dataset import write_world
    from loraseg.miniature.world.domains import DOMAINS

    if min(arguments.train, arguments.val) < 1:
        raise ConfigError("--train and --val: expected at least 1")
    names = split_names(arguments.domains) if arguments.domains else tuple(DOMAINS)
    folders = write_world(
        Path(arguments.folder),
        names,
        train=arguments.train,
        val=arguments.val,
        seed=arguments.seed,
    )
    for name, folder in folders.items():
        print_line(f"{folder}  ({DOMAINS[name].family} family)")
    return 0
