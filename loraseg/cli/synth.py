"""``loraseg synth ls | show | export | verify | replay | fidelity``: use synthetic datasets."""

import argparse
import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraseg.cli.console import print_line, print_table, write_files
from loraseg.cli.fidelity import add_fidelity
from loraseg.cli.inputs import open_with_short_retries
from loraseg.cli.replay import add_replay
from loraseg.errors import ConfigError

if TYPE_CHECKING:
    from loraseg.data.shards.reader import ShardDataset
    from loraseg.data.shards.schema import PairRow

__all__ = ["FORMATS", "add"]

# The keys of loraseg.data.exports.EXPORTERS, which is slow to import.
FORMATS = ("folder", "webdataset", "coco", "hf-parquet")
_STATUSES = ("ok", "dropped", "bad_mask", "duplicate")
_IMAGE_COLUMNS = ("image", "label", "mask", "predicted")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    group = commands.add_parser("synth", help="inspect, export and replay synthetic datasets")
    actions = group.add_subparsers(required=True, metavar="ACTION")
    _add_read_actions(actions)
    _add_export(actions)
    add_replay(actions)
    add_fidelity(actions)


def _add_read_actions(actions: Any) -> None:
    listing = actions.add_parser("ls", help="list the committed shards, or their rows")
    listing.add_argument("uri", metavar="URI")
    listing.add_argument(
        "--status",
        choices=_STATUSES,
        action="append",
        help="list the rows with this status, one per line; may be repeated",
    )
    listing.set_defaults(command=_ls)
    show = actions.add_parser("show", help="print the row of a pair and write its images")
    show.add_argument("uri", metavar="URI")
    show.add_argument("pair", metavar="PAIR_ID", help="id or its first digits")
    show.add_argument("--out", metavar="DIR", help="write its image, label and mask to this folder")
    show.set_defaults(command=_show)
    verify = actions.add_parser(
        "verify", help="read all shards and compare them with their digests"
    )
    verify.add_argument("uri", metavar="URI")
    verify.set_defaults(command=_verify)


def _add_export(actions: Any) -> None:
    export = actions.add_parser("export", help="write the pairs in another format")
    export.add_argument("uri", metavar="URI")
    export.add_argument("format", choices=FORMATS)
    export.add_argument("folder", metavar="FOLDER", help="folder to create; must not exist")
    export.add_argument("--split", metavar="NAME", help="default: train; not for coco")
    export.set_defaults(command=_export)


def _ls(arguments: argparse.Namespace) -> int:
    dataset = _open_dataset(arguments.uri)
    if arguments.status is None:
        _list_shards(dataset)
        return 0
    for row in dataset.rows(statuses=arguments.status, columns=("reason", "k", "kept")):
        kept = "-" if row.kept is None else f"{100 * row.kept:.1f} %"
        columns = (row.pair_id or "-", row.status, _or_dash(row.k), kept, row.mask_name)
        print_line("\t".join((*columns, _printable(row.reason or "-"))))
    return 0


def _list_shards(dataset: "ShardDataset") -> None:
    manifest = dataset.manifest
    rows = [("FILE", "SHA256", "KB", *(status.upper() for status in _STATUSES))]
    for entry in manifest.shards:
        counts = (str(entry.statuses[status]) for status in _STATUSES)
        rows.append((entry.file, entry.sha256[:12], str(entry.size_bytes // 1000), *counts))
    print_table(rows)
    print_line(f"classes: {', '.join(manifest.classes)}")
    counts = ", ".join(f"{manifest.statuses[status]} {status}" for status in _STATUSES)
    print_line(f"generation {manifest.generation}: {manifest.masks} masks, rows: {counts}")


def _show(arguments: argparse.Namespace) -> int:
    row = _open_dataset(arguments.uri).find_pair(arguments.pair)
    print_line(json.dumps(_printable_row(row), indent=1, ensure_ascii=False))
    if arguments.out is not None:
        files = {name: data for name in _IMAGE_COLUMNS if (data := getattr(row, name)) is not None}
        write_files(
            Path(arguments.out), {_file_name(row, name): data for name, data in files.items()}
        )
    return 0


def _printable_row(row: "PairRow") -> dict[str, Any]:
    values = asdict(row)
    for name in _IMAGE_COLUMNS:
        if values[name] is not None:
            values[name] = f"{len(values[name])} bytes"
    for name in ("adapters", "heads"):
        values[name] = [
            {"name": used, "digest": digest, "weight": weight}
            for used, digest, weight in values[name]
        ]
    with contextlib.suppress(ValueError, RecursionError):  # invalid JSON is shown as text
        values["lineage"] = json.loads(row.lineage or "null")
    return values


def _file_name(row: "PairRow", name: str) -> str:
    # The suffix follows the file's first bytes: a shard may hold other data than it claims.
    signatures = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg"}
    data: bytes = getattr(row, name)
    suffix = next((end for start, end in signatures.items() if data.startswith(start)), "bin")
    return f"{(row.pair_id or '')[:16]}_{name}.{suffix}"


def _verify(arguments: argparse.Namespace) -> int:
    from loraseg.data.shards.audit import audit_shards

    dataset = _open_dataset(arguments.uri)
    audit = audit_shards(dataset)
    for problem in audit.problems:
        print_line(f"damaged: {_printable(problem)}")
    for key in audit.uncommitted:
        print_line(f"not committed: {_printable(key)}")
    verdict = "DAMAGED" if audit.problems else f"ok, rows {audit.digest}"
    print_line(
        f"{arguments.uri}: {len(dataset.manifest.shards)} shards, {audit.rows} rows, {verdict}"
    )
    return int(bool(audit.problems))


def _export(arguments: argparse.Namespace) -> int:
    if arguments.split is not None and arguments.format == "coco":
        raise ConfigError("--split: a COCO file has no splits")
    from loraseg.data.exports import EXPORTERS

    options = {} if arguments.split is None else {"split": arguments.split}
    export: Any = EXPORTERS[arguments.format]
    count = export(_open_dataset(arguments.uri), Path(arguments.folder), **options)
    print_line(f"{arguments.folder}: {count} pairs")
    return 0


def _open_dataset(uri: str) -> "ShardDataset":
    from loraseg.data.shards.reader import ShardDataset

    return ShardDataset.open(open_with_short_retries(uri))


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _printable(text: str) -> str:
    """Replace control characters, which a terminal would execute."""
    return "".join(char if char.isprintable() else "?" for char in text)
