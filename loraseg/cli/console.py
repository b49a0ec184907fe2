"""What a person gets: results on stdout and in files, complaints on stderr."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loraseg.errors import StoreError

__all__ = ["complain", "keep_files", "names", "say", "say_table"]


def say(line: str) -> None:
    """Print one line of results."""
    sys.stdout.write(f"{line}\n")


def complain(error: Exception) -> None:
    """Print why something failed, in one line."""
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")


def say_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(map(str.ljust, row, widths)).rstrip())


def names(text: str) -> tuple[str, ...]:
    """Split "road, car" into its names; empty ones fall away."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def keep_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name into a folder, which is made at need.

    Raises:
        StoreError: It cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise StoreError(f"{folder}: cannot write: {error.strerror}") from error
