"""When to ask again, and when to give up."""

import ssl
import time

import httpx2

from loraseg.errors import ServiceError

__all__ = ["Deadline", "RetryableError", "connection_error", "parse_retry_after", "retry_delay_s"]

_FIRST_DELAY_S = 0.25
_MAX_DELAY_S = 8.0
# Beyond it, waiting out a Retry-After is no longer a retry but a schedule.
_MAX_RETRY_AFTER_S = 3600.0


class RetryableError(ServiceError):
    """A refusal or broken connection that may pass by itself: worth another attempt."""


class Deadline:
    """A number of seconds that run down, until they are renewed."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.reset()

    @property
    def remaining_s(self) -> float:
        """Return what is left, at least 0."""
        return max(0.0, self._expires_at - time.monotonic())

    def reset(self) -> None:
        """Begin anew."""
        self._expires_at = time.monotonic() + self.timeout_s


def retry_delay_s(
    attempt: int, error: ServiceError, *, retries: int, remaining_s: float, jitter: float
) -> float | None:
    """Return how long to wait before another attempt; None to give up.

    At least what the endpoint asked for, and beyond that exponential and jittered, so that many
    clients who were refused together do not return together.

    Args:
        attempt: Which one failed, from 0.
        error: How.
        retries: Most attempts after the first.
        remaining_s: Seconds until the answer is worthless; a longer pause is not worth its while.
        jitter: In [0, 1), drawn anew each time.
    """
    if not isinstance(error, RetryableError) or attempt >= retries:
        return None
    bound = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** min(attempt, 16))
    pause = (error.retry_after_s or 0.0) + jitter * bound
    return pause if pause < remaining_s else None


def parse_retry_after(text: str | None) -> float | None:
    """Read a Retry-After header of seconds; None for anything else.

    The form with a date is not read: it would depend on two clocks agreeing.
    """
    if text is None or not text.isascii() or not text.strip().isdecimal() or len(text) > 9:
        return None
    return min(float(text), _MAX_RETRY_AFTER_S)


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
    return RetryableError("unreachable", f"{url}: {reason}")
