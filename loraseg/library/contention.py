"""How writers that compete for one object stay out of each other's way without talking."""

import time

from loraseg.storage import backoff_s

__all__ = ["ContentionBackoff"]

_INITIAL_BACKOFF_S = 0.02
_MAX_BACKOFF_S = 1.0
_MAX_FAILURES = 7  # where the longest pause is reached


class ContentionBackoff:
    """Pauses that grow while attempts are lost to others and shrink while they succeed.

    Every attempt that is lost costs its writer, the server and all others time; every pause in
    which nobody writes costs time as well. One loss makes up for half a win, so the pauses settle
    where every third attempt or so succeeds; the longest is the same for all, so that who has lost
    most does not wait longer still. They outlive one publication: else who has just succeeded
    would start the next one ahead of all that wait. A writer that is alone never pauses.
    """

    def __init__(self) -> None:
        self._failures = 0

    def succeeded(self) -> None:
        """Take note that an attempt succeeded."""
        self._failures = max(0, self._failures - 2)

    def failed(self) -> None:
        """Take note that another writer was faster."""
        self._failures = min(self._failures + 1, _MAX_FAILURES)

    def wait(self) -> None:
        """Pause before the next attempt."""
        if self._failures:
            time.sleep(backoff_s(self._failures - 1, _INITIAL_BACKOFF_S, _MAX_BACKOFF_S))
