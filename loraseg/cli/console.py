"""Output of commands: results go to stdout and files, errors and progress to stderr."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loraseg.errors import StoreError

__all__ = ["print_error", "print_line", "print_table", "write_files"]


def print_line(line: str) -> None:
    """Print one line of results."""
    sys.stdout.write(f"{line}\n")


def print_error(error: Exception) -> None:
    """Print an error message on one line of stderr."""
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print_line("  ".join(map(str.ljust, row, widths)).rstrip())


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name into a folder, which is created if it is missing.

    Raises:
        StoreError: The folder or a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as error:
        raise StoreError(f"{folder}: cannot write: {error.strerror}") from error
