"""``loraseg serve``: serve libraries over HTTP from one process, without Ray."""

import argparse
import logging
import sys
from typing import Any

from loraseg.cli.console import print_line

__all__ = ["add"]

_DESCRIPTION = """\
Serve adapter libraries over HTTP from one process, without Ray. The page is at the
printed URL. SIGINT (Ctrl-C) or SIGTERM stops the server after the running requests.
Other interfaces than loopback require a token file (tokens=FILE).
`python -m jobs.serve` serves the same settings from a Ray cluster."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "serve",
        help="serve libraries over HTTP, with a demo page",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the settings")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="such as libraries.main=s3://bucket/adapters port=8000 limits.images=16",
    )
    parser.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from loraseg import config as configuration
    from loraseg.serving.listen import ServeConfig
    from loraseg.serving.local_server import serve_local

    config = configuration.load(ServeConfig, arguments.config, arguments.settings)
    logging.getLogger("loraseg").setLevel(logging.INFO)
    serve_local(config, _announce)
    return 0


def _announce(url: str) -> None:
    print_line(f"ready: {url}")
    sys.stdout.flush()
