"""Backoff between writers that compete for one object."""

import time

from loraseg.storage import backoff_s

__all__ = ["ContentionBackoff"]

_INITIAL_BACKOFF_S = 0.02
_MAX_BACKOFF_S = 1.0
_MAX_FAILURES = 7  # the pause does not grow further


class ContentionBackoff:
    """Pauses that grow with failed attempts and shrink with successful ones.

    A failed attempt costs time of all writers and of the server; a pause in which no writer is
    active costs time too. A success undoes two failures, so the pauses settle where about every
    third attempt succeeds. The longest pause is the same for all writers, so that failures do not
    accumulate. The state outlives one publication; otherwise a writer that has just succeeded would
    start the next one ahead of all waiting writers. A single writer never pauses.
    """

    def __init__(self) -> None:
        self._failures = 0

    def succeeded(self) -> None:
        """Record a successful attempt."""
        self._failures = max(0, self._failures - 2)

    def failed(self) -> None:
        """Record an attempt that another writer preceded."""
        self._failures = min(self._failures + 1, _MAX_FAILURES)

    def wait(self) -> None:
        """Pause before the next attempt."""
        if self._failures:
            time.sleep(backoff_s(self._failures - 1, _INITIAL_BACKOFF_S, _MAX_BACKOFF_S))
