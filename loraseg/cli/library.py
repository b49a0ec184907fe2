"""``loraseg library ls | show | verify | rollback | retire``."""

import argparse
import json
from typing import Any

from loraseg.cli.console import say, say_table

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    group = commands.add_parser("library", help="look into an adapter library, roll back, retire")
    actions = group.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("ls", help="list the current adapters")
    listing.add_argument("uri", metavar="URI")
    listing.add_argument("--base", metavar="DIGEST", help="only for this base; first digits do")
    listing.set_defaults(command=_ls)
    show = actions.add_parser("show", help="print an adapter's versions and card")
    show.add_argument("uri", metavar="URI")
    show.add_argument("name", metavar="NAME")
    show.add_argument("--version", type=int, metavar="N", help="default: the current one")
    show.set_defaults(command=_show)
    verify = actions.add_parser("verify", help="compare all files with their digests")
    verify.add_argument("uri", metavar="URI")
    verify.set_defaults(command=_verify)
    rollback = actions.add_parser("rollback", help="let a name point to another version")
    rollback.add_argument("uri", metavar="URI")
    rollback.add_argument("name", metavar="NAME")
    rollback.add_argument("version", type=int, metavar="VERSION")
    rollback.set_defaults(command=_rollback)
    retire = actions.add_parser(
        "retire", help="list and serve a name no more; its versions stay, rollback brings it back"
    )
    retire.add_argument("uri", metavar="URI")
    retire.add_argument("name", metavar="NAME")
    retire.set_defaults(command=_retire)


def _ls(arguments: argparse.Namespace) -> int:
    wanted = arguments.base or ""
    entries = [e for e in _open(arguments.uri).entries() if e.card.base.digest.startswith(wanted)]
    if not entries:
        say(f"{arguments.uri}: no adapters" + (f" for base {wanted}" if wanted else ""))
        return 0
    rows = [("NAME", "VERSION", "ROLE", "BASE", "CLASSES", "IMAGES", "MIOU", "KB", "DIGEST")]
    rows += [_row(entry) for entry in entries]
    say_table(rows)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    library = _open(arguments.uri)
    entry = library.entry(arguments.name, arguments.version)
    for known in library.versions(arguments.name):
        mark = "*" if known.current else " "
        say(f"{mark} version {known.version}  {known.digest}  {known.size_bytes} bytes")
    card = entry.card.to_json()
    for centroid in card["centroids"]:
        # Hundreds of numbers would bury what a person looks for.
        centroid["vector"] = f"{len(centroid['vector'])} numbers"
    say(json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    report = _open(arguments.uri).verify()
    for what, keys in (
        ("missing", report.missing),
        ("corrupt", report.corrupt),
        ("unused", report.garbage),
    ):
        for key in keys:
            say(f"{what}: {key}")
    verdict = "ok" if report.ok else "DAMAGED: publish the adapters concerned again"
    say(f"{arguments.uri}: {report.checked} objects checked, {verdict}")
    return int(not report.ok)


def _rollback(arguments: argparse.Namespace) -> int:
    entry = _open(arguments.uri).rollback(arguments.name, arguments.version)
    say(f"{entry.name} is version {entry.version} now ({entry.digest})")
    return 0


def _retire(arguments: argparse.Namespace) -> int:
    _open(arguments.uri).retire(arguments.name)
    say(f"{arguments.name} is retired")
    return 0


def _open(uri: str) -> Any:
    from loraseg.library.catalog import Library
    from loraseg.storage import SHORT_PATIENCE_S, open_store

    return Library(open_store(uri).with_patience(SHORT_PATIENCE_S))


def _row(entry: Any) -> tuple[str, ...]:
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
