"""Settings of a run as dotted keys and text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

__all__ = ["KeyValues", "flatten"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyValues:
    """A table of names and values.

    Attributes:
        rows: (name, value) from top to bottom.
        summary: Label of the toggle that shows the table; empty for a table that is always shown.
    """

    macro: ClassVar[str] = "key_values"
    rows: Sequence[tuple[str, str]]
    summary: str = ""

    def view(self) -> "KeyValues":
        """Return the block itself."""
        return self


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted key, text) of nested mappings, in their own order.

    The items of a list are separated by commas. An empty mapping is kept as ``{}``.
    """
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows.append((f"{prefix}{key}", ", ".join(map(str, cast(Iterable[Any], value)))))
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows
