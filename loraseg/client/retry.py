"""When to ask again, and when to give up."""

import ssl
import time

import httpx2

from loraseg.errors import ServiceError

__all__ = ["PassingError", "Patience", "connection_error", "pause_s", "retry_after_s"]

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 8.0
# Beyond it, waiting out a Retry-After is no longer a retry but a schedule.
_LONGEST_RETRY_AFTER_S = 3600.0


class PassingError(ServiceError):
    """A refusal or broken connection that may pass by itself: worth another attempt."""


class Patience:
    """A number of seconds that run down, until they are renewed."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.renew()

    @property
    def left_s(self) -> float:
        """Return what is left, at least 0."""
        return max(0.0, self._until - time.monotonic())

    def renew(self) -> None:
        """Begin anew."""
        self._until = time.monotonic() + self.seconds


def pause_s(
    attempt: int, error: ServiceError, *, retries: int, left_s: float, jitter: float
) -> float | None:
    """Return how long to wait before another attempt; None to give up.

    At least what the endpoint asked for, and beyond that exponential and jittered, so that many
    clients who were refused together do not return together.

    Args:
        attempt: Which one failed, from 0.
        error: How.
        retries: Most attempts after the first.
        left_s: Seconds until the answer is worthless; a longer pause is not worth its while.
        jitter: In [0, 1), drawn anew each time.
    """
    if not isinstance(error, PassingError) or attempt >= retries:
        return None
    bound = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(attempt, 16))
    pause = (error.retry_after_s or 0.0) + jitter * bound
    return pause if pause < left_s else None


def retry_after_s(text: str | None) -> float | None:
    """Read a Retry-After header of seconds; None for anything else.

    The form with a date is not read: it would depend on two clocks agreeing.
    """
    if text is None or not text.isascii() or not text.strip().isdecimal() or len(text) > 9:
        return None
    return min(float(text), _LONGEST_RETRY_AFTER_S)


def connection_error(error: httpx2.TransportError, url: str) -> ServiceError:
    """Turn a failed transfer into an error; a passing one, unless it can never succeed."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
        return ServiceError("unreachable", f"{url}: {reason}")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):  # a wrong certificate stays wrong
            return ServiceError("unreachable", f"{url}: {cause.verify_message}")
        cause = cause.__cause__ or cause.__context__
    return PassingError("unreachable", f"{url}: {reason}")
