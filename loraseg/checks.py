"""The result of one check of ``loraseg doctor``."""

from dataclasses import dataclass

__all__ = ["Check"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of output; ``ok`` is False if the user has to act."""

    name: str
    detail: str
    ok: bool = True
