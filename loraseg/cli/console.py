"""What a person gets: results on stdout and in files, complaints on stderr."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loraseg.errors import StoreError

__all__ = ["print_error", "print_line", "print_table", "split_names", "write_files"]


def print_line(line: str) -> None:
    """Print one line of results."""
    sys.stdout.write(f"{line}\n")


def print_error(error: Exception) -> None:
    """Print why something failed, in one line."""
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print_line("  ".join(map(str.ljust, row, widths)).rstrip())


def split_names(text: str) -> tuple[str, ...]:
    """Split "road, car" into its names; empty ones fall away."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
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
