"""``loraseg report show | compare``: read and compare layer reports."""

import argparse
import sys
from typing import Any

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    group = commands.add_parser("report", help="show and compare layer reports (of jobs.probe)")
    actions = group.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser(
        "show", help="print the top layers and the scores per part of the model"
    )
    show.add_argument("file", metavar="FILE", help="path or URI of a layer report")
    show.add_argument("--top", type=int, default=10, metavar="K", help="default: 10 layers")
    show.set_defaults(command=_show)
    compare = actions.add_parser("compare", help="print how much two reports agree")
    compare.add_argument("first", metavar="A")
    compare.add_argument("second", metavar="B")
    compare.add_argument(
        "--top",
        type=int,
        action="append",
        metavar="K",
        help="compare the first K layers; may be repeated",
    )
    compare.set_defaults(command=_compare)
    for parser in (show, compare):
        parser.add_argument(
            "--projections",
            action="store_true",
            help="only the attention projections, the layers that adapters change",
        )


def _show(arguments: argparse.Namespace) -> int:
    from loraseg.probes.tables import format_report

    sys.stdout.write(format_report(_read(arguments.file, arguments), arguments.top))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from loraseg.probes.tables import format_comparison

    first, second = (_read(file, arguments) for file in (arguments.first, arguments.second))
    sys.stdout.write(format_comparison(first, second, arguments.top or ()))
    return 0


def _read(uri: str, arguments: argparse.Namespace) -> Any:
    from loraseg.adapters.targets.layer_report_io import read_layer_report

    report = read_layer_report(uri)
    return report.projections() if arguments.projections else report
