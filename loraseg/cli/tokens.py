"""``loraseg token new``: create a bearer token for an endpoint."""

import argparse
from typing import Any

from loraseg.cli.console import print_line
from loraseg.cli.inputs import split_names

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to the parser."""
    group = commands.add_parser("token", help="create bearer tokens for an endpoint")
    actions = group.add_subparsers(required=True, metavar="ACTION")
    new = actions.add_parser("new", help="print a new token and its entry for the token file")
    new.add_argument("--name", required=True, metavar="NAME", help="name of the client, for logs")
    new.add_argument(
        "--roles",
        default="segment",
        metavar="ROLES",
        help='"segment" or "segment,admin"; default: %(default)s',
    )
    new.add_argument(
        "--adapters", metavar="PATTERNS", help='visible adapters, e.g. "night*, rain"; default: all'
    )
    new.add_argument(
        "--concurrent", type=int, metavar="N", help="maximum number of concurrent requests"
    )
    new.set_defaults(command=_new)


def _new(arguments: argparse.Namespace) -> int:
    import yaml

    from loraseg.config import build, to_dict
    from loraseg.serving.tokens import Token, new_token

    token, digest = new_token()
    values = {
        "name": arguments.name,
        "sha256": digest,
        "roles": split_names(arguments.roles),
        "adapters": None if arguments.adapters is None else split_names(arguments.adapters),
        "concurrent": arguments.concurrent,
    }
    entry = to_dict(build(Token, values, where="token"))
    given = {key: value for key, value in entry.items() if value is not None}
    print_line(f"# The token; it is not stored anywhere:\n{token}\n")
    print_line("# Entry for the token file, below 'tokens:':")
    print_line(
        yaml.safe_dump([given], sort_keys=False, allow_unicode=True, default_flow_style=None)
    )
    return 0
