"""Lines for a person: results on stdout, complaints on stderr."""

import sys
from collections.abc import Sequence

__all__ = ["complain", "names", "say", "say_table"]


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
