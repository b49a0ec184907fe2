"""``loraseg library ls | show | verify | rollback | retire``: inspect and manage a library."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from loraseg.cli.console import print_line, print_table
from loraseg.cli.inputs import open_with_short_retries

if TYPE_CHECKING:
    from loraseg.library.catalog import Library
    from loraseg.library.snapshot import CatalogEntry

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    group = commands.add_parser(
        "library", help="inspect an adapter library; roll back or retire adapters"
    )
    actions = group.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("ls", help="list the current version of every adapter")
    listing.add_argument("uri", metavar="URI")
    listing.add_argument(
        "--base", metavar="DIGEST", help="only adapters for this base; first digits suffice"
    )
    listing.set_defaults(command=_ls)
    show = actions.add_parser("show", help="print an adapter's versions and card")
    show.add_argument("uri", metavar="URI")
    show.add_argument("name", metavar="NAME")
    show.add_argument("--version", type=int, metavar="N", help="default: the current version")
    show.set_defaults(command=_show)
    verify = actions.add_parser("verify", help="compare every file with its digest")
    verify.add_argument("uri", metavar="URI")
    verify.set_defaults(command=_verify)
    rollback = actions.add_parser(
        "rollback", help="make another version of an adapter the current one"
    )
    rollback.add_argument("uri", metavar="URI")
    rollback.add_argument("name", metavar="NAME")
    rollback.add_argument("version", type=int, metavar="VERSION")
    rollback.set_defaults(command=_rollback)
    retire = actions.add_parser(
        "retire",
        help="stop listing and serving an adapter; its versions stay, rollback restores it",
    )
    retire.add_argument("uri", metavar="URI")
    retire.add_argument("name", metavar="NAME")
    retire.set_defaults(command=_retire)


def _ls(arguments: argparse.Namespace) -> int:
    base = arguments.base or ""
    entries = [
        e for e in _open_library(arguments.uri).entries() if e.card.base.digest.startswith(base)
    ]
    if not entries:
        print_line(f"{arguments.uri}: no adapters" + (f" for base {base}" if base else ""))
        return 0
    rows = [("NAME", "VERSION", "ROLE", "BASE", "CLASSES", "IMAGES", "MIOU", "KB", "DIGEST")]
    rows += [_row(entry) for entry in entries]
    print_table(rows)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    library = _open_library(arguments.uri)
    entry = library.entry(arguments.name, arguments.version)
    for other in library.versions(arguments.name):
        mark = "*" if other.current else " "
        print_line(f"{mark} version {other.version}  {other.digest}  {other.size_bytes} bytes")
    card = entry.card.to_json()
    for centroid in card["centroids"]:
        # Hundreds of numbers would hide the rest of the card.
        centroid["vector"] = f"{len(centroid['vector'])} numbers"
    print_line(json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    report = _open_library(arguments.uri).verify()
    for state, keys in (
        ("missing", report.missing),
        ("corrupt", report.corrupt),
        ("unused", report.garbage),
    ):
        for key in keys:
            print_line(f"{state}: {key}")
    verdict = "ok" if report.ok else "DAMAGED: publish the affected adapters again"
    print_line(f"{arguments.uri}: {report.checked} objects checked, {verdict}")
    return int(not report.ok)


def _rollback(arguments: argparse.Namespace) -> int:
    entry = _open_library(arguments.uri).rollback(arguments.name, arguments.version)
    print_line(f"{entry.name} is now version {entry.version} ({entry.digest})")
    return 0


def _retire(arguments: argparse.Namespace) -> int:
    _open_library(arguments.uri).retire(arguments.name)
    print_line(f"{arguments.name} is retired")
    return 0


def _open_library(uri: str) -> "Library":
    from loraseg.library.catalog import Library

    return Library(open_with_short_retries(uri))


def _row(entry: "CatalogEntry") -> tuple[str, ...]:
    card = entry.card
    miou = card.metrics.get("miou")
    return (
        entry.name,
        str(entry.version),
        card.role,
        f"{card.base.name} {card.base.digest[:12]}",
        str(len(card.label_space)),
        "-" if card.training is None else str(card.training.images),
        f"{100 * miou:.1f}" if isinstance(miou, float) else "-",
        str(entry.size_bytes // 1000),
        entry.digest[:12],
    )
