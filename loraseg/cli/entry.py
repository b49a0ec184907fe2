"""Parse the command line, run one command and map errors to the exit status."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loraseg.cli import (
    generate,
    library,
    miniature,
    report,
    segment,
    serve,
    synth,
    tokens,
    train_base,
)
from loraseg.cli.console import print_error, print_line, print_table
from loraseg.cli.inputs import endpoint_token
from loraseg.errors import AdapterNotFoundError, ConfigError, LorasegError

if TYPE_CHECKING:
    from loraseg.checks import Check

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 success, 1 failure, 2 usage error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        status = command(arguments)
        sys.stdout.flush()
    except (ConfigError, AdapterNotFoundError) as error:
        print_error(error)
        return 2
    except LorasegError as error:
        print_error(error)
        return 1
    except BrokenPipeError:
        # The reader closed the pipe, as in `loraseg library ls URI | head`. Without the redirection
        # Python reports the error a second time when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraseg",
        description="Train, store and use LoRA adapters for segmentation.",
        epilog="Training, evaluation, serving and batches on Ray: python -m jobs.NAME --help.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    segment.add(commands)
    generate.add(commands)
    library.add(commands)
    report.add(commands)
    synth.add(commands)
    train_base.add(commands)
    miniature.add(commands)
    serve.add(commands)
    tokens.add(commands)
    _add_spread(commands)
    _add_doctor(commands)
    return parser


def _add_spread(commands: Any) -> None:
    parser = commands.add_parser(
        "spread", help="mean and standard deviation over several results.json files"
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS")
    parser.set_defaults(command=_spread)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="check versions and devices, a store, an endpoint")
    parser.add_argument(
        "--store", metavar="URI", help="also check conditional writes in this store"
    )
    parser.add_argument(
        "--measure-merging",
        action="store_true",
        help="measure when merging adapters is faster on this device; store the table in the "
        "cache folder",
    )
    parser.add_argument(
        "--endpoint", metavar="URL", help="also check this endpoint and segment a tiny image"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="file with the bearer token of the endpoint"
    )
    parser.set_defaults(command=_doctor)


def _spread(arguments: argparse.Namespace) -> int:
    from loraseg.evaluate.seed_summary import summarise_seeds

    sys.stdout.write(summarise_seeds(arguments.results))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from loraseg.doctor import measure_merging, run_checks

    checks = [*run_checks(arguments.store), *_check_endpoint(arguments)]
    if arguments.measure_merging:
        checks.append(measure_merging())
    print_table([("ok" if check.ok else "BAD", check.name, check.detail) for check in checks])
    failed = [check.name for check in checks if not check.ok]
    if failed:
        print_line(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def _check_endpoint(arguments: argparse.Namespace) -> "list[Check]":
    token = endpoint_token(arguments)
    if arguments.endpoint is None:
        return []
    from loraseg.client.health import check_endpoint

    return list(check_endpoint(arguments.endpoint, token))
