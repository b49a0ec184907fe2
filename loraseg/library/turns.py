"""How writers that compete for one object stay out of each other's way without talking."""

import time

from loraseg.storage import backoff_s

__all__ = ["Turns"]

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0
_MOST_LOSSES = 7  # where the longest pause is reached


class Turns:
    """Pauses that grow while attempts are lost to others and shrink while they succeed.

    Every attempt that is lost costs its writer, the server and all others time; every pause in
    which nobody writes costs time as well. One loss makes up for half a win, so the pauses settle
    where every third attempt or so succeeds; the longest is the same for all, so that who has lost
    most does not wait longer still. They outlive one publication: else who has just succeeded
    would start the next one ahead of all that wait. A writer that is alone never pauses.
    """

    def __init__(self) -> None:
        self._losses = 0

    def won(self) -> None:
        """Take note that an attempt succeeded."""
        self._losses = max(0, self._losses - 2)

    def lost(self) -> None:
        """Take note that another writer was faster."""
        self._losses = min(self._losses + 1, _MOST_LOSSES)

    def wait(self) -> None:
        """Pause before the next attempt."""
        if self._losses:
            time.sleep(backoff_s(self._losses - 1, _FIRST_PAUSE_S, _LONGEST_PAUSE_S))
