"""Tables of aligned text for the terminal."""

from collections.abc import Collection, Sequence

__all__ = ["align_columns", "format_table"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a left-aligned table; every line ends in a newline."""
    return "".join(f"{line}\n" for line in align_columns([header, *rows]))


def align_columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return one line per row, with two spaces between columns.

    Args:
        rows: Rows of equal length.
        right: Indices of the columns that are aligned to the right.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
