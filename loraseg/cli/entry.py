"""Parse the command line, run one command, turn errors into an exit status."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loraseg.cli import generate, library, miniature, report, segment, synth, tokens, train_base
from loraseg.cli.console import print_error, print_line, print_table
from loraseg.errors import AdapterNotFoundError, ConfigError, LorasegError

if TYPE_CHECKING:
    from loraseg.doctor import Check

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 failed, 2 the user's mistake."""
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
        # Whoever read our output has seen enough, as in `loraseg library ls URI | head`. Python
        # would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraseg",
        description="A library of LoRA adapters for segmentation, retrieved and fused per image.",
        epilog="On a cluster: python -m jobs.train_adapters, jobs.evaluate and jobs.probe.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    segment.add(commands)
    generate.add(commands)
    library.add(commands)
    report.add(commands)
    synth.add(commands)
    train_base.add(commands)
    miniature.add(commands)
    tokens.add(commands)
    _add_spread(commands)
    _add_doctor(commands)
    return parser


def _add_spread(commands: Any) -> None:
    parser = commands.add_parser("spread", help="mean and deviation over several results.json")
    parser.add_argument("results", nargs="+", metavar="RESULTS")
    parser.set_defaults(command=_spread)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="check versions, devices, a store, an endpoint")
    parser.add_argument("--store", metavar="URI", help="probe it for conditional writes")
    parser.add_argument(
        "--measure-merging",
        action="store_true",
        help="measure when to merge adapters on this device and keep it in the cache folder",
    )
    parser.add_argument("--endpoint", metavar="URL", help="check it, and segment a tiny image")
    parser.add_argument("--token-file", metavar="FILE", help="holds its bearer token")
    parser.set_defaults(command=_doctor)


def _spread(arguments: argparse.Namespace) -> int:
    from loraseg.evaluate.seed_summary import summarise_seeds

    sys.stdout.write(summarise_seeds(arguments.results))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from loraseg.doctor import measure_merging, run_checks

    findings = list(run_checks(arguments.store))
    findings += _check_endpoint(arguments)
    if arguments.measure_merging:
        findings.append(measure_merging())
    print_table([("ok" if f.ok else "BAD", f.name, f.detail) for f in findings])
    unwell = [finding.name for finding in findings if not finding.ok]
    if unwell:
        print_line(f"needs care: {', '.join(unwell)}")
    return int(bool(unwell))


def _check_endpoint(arguments: argparse.Namespace) -> "list[Check]":
    if arguments.endpoint is None:
        if arguments.token_file is not None:
            raise ConfigError("--token-file: goes with --endpoint only")
        return []
    from loraseg.client.endpoint import read_token
    from loraseg.client.health import check_endpoint

    token = None if arguments.token_file is None else read_token(arguments.token_file)
    return list(check_endpoint(arguments.endpoint, token))
