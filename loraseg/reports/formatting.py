"""Numbers as text: percentages, differences, shares."""

import math
from typing import TypeGuard

__all__ = ["ABSENT", "format_difference", "format_percent", "is_defined", "share_of"]

ABSENT = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def is_defined(value: float | None) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return value is not None and math.isfinite(value)


def format_percent(value: float | None, *, digits: int = 1, absent: str = ABSENT) -> str:
    """Return a share in [0, 1] in percent, or ``absent`` for None, nan and infinity."""
    return f"{100 * value:.{digits}f}" if is_defined(value) else absent


def format_difference(value: float | None, base: float | None) -> tuple[str, str]:
    """Return the difference of two shares in points and its direction.

    Returns:
        The difference with its sign, and "up", "down" or "same"; two empty strings if either value
        is undefined. "same" means that the difference rounds to 0.0.
    """
    if not (is_defined(value) and is_defined(base)):
        return "", ""
    text = f"{100 * (value - base):+.1f}"
    if float(text) == 0:
        return "0.0", "same"
    return text.replace("-", _MINUS), "up" if value > base else "down"


def share_of(value: float | None, full: float) -> float:
    """Return ``value / full`` clipped to [0, 1] and rounded to 4 digits; 0 where undefined."""
    if not is_defined(value) or full <= 0:
        return 0.0
    return round(min(max(value / full, 0.0), 1.0), 4)
