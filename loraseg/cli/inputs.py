"""Checks and conversions of arguments that several commands share."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraseg.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from loraseg.data.labels import LabelSpace
    from loraseg.storage import ObjectStore

__all__ = [
    "check_files",
    "endpoint_token",
    "open_with_short_retries",
    "parse_classes",
    "split_names",
]


def split_names(text: str) -> tuple[str, ...]:
    """Split "road, car" into its names; empty names are dropped."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_classes(text: str, *, allow_file: bool = False) -> "LabelSpace":
    """Return the label space of ``--classes``.

    Args:
        text: Comma-separated names, or the path of a ``classes.json``.
        allow_file: Whether a path is accepted.

    Raises:
        ConfigError: The names or the file are invalid.
    """
    from loraseg.data.labels import LabelSpace, read_classes

    try:
        if allow_file and (text.endswith(".json") or Path(text).is_file()):
            return read_classes(text)
        return LabelSpace(split_names(text))
    except DatasetError as error:
        raise ConfigError(f"--classes: {error}") from error


def check_files(files: Sequence[str], kind: str, outputs: str) -> list[Path]:
    """Return the paths of input files.

    Args:
        files: Paths.
        kind: "image" or "mask", for messages.
        outputs: What the command derives from each file, for messages.

    Raises:
        ConfigError: A file does not exist, or two have the same name without suffix, so that
            their outputs would have the same names.
    """
    paths = [Path(file) for file in files]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ConfigError(f"no such {kind}: {', '.join(missing)}")
    for stem, count in Counter(path.stem for path in paths).items():
        if count > 1:
            raise ConfigError(f"{count} {kind}s are called {stem!r}; their {outputs} would collide")
    return paths


def endpoint_token(arguments: argparse.Namespace) -> str | None:
    """Return the token in ``--token-file``; None without the option.

    Raises:
        ConfigError: The file has no valid token, or ``--endpoint`` is not given.
    """
    if arguments.token_file is None:
        return None
    if arguments.endpoint is None:
        raise ConfigError("--token-file: requires --endpoint")
    from loraseg.client.endpoint import read_token

    return read_token(arguments.token_file)


def open_with_short_retries(uri: str) -> "ObjectStore":
    """Open a store whose requests are retried for seconds, since a user waits for the answer."""
    from loraseg.storage import SHORT_RETRY_TIMEOUT_S, open_store

    return open_store(uri).with_retry_timeout(SHORT_RETRY_TIMEOUT_S)
