"""Retry policy: which errors are retried, after which delay, until which deadline."""

import ssl
import time

import httpx2

from loraseg.errors import ServiceError

__all__ = ["Deadline", "RetryableError", "connection_error", "parse_retry_after", "retry_delay_s"]

_FIRST_DELAY_S = 0.25
_MAX_DELAY_S = 8.0
_MAX_RETRY_AFTER_S = 3600.0  # longer values are shortened


class RetryableError(ServiceError):
    """A temporary error: the same request may succeed later."""


class Deadline:
    """A time limit that can be restarted."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.reset()

    @property
    def remaining_s(self) -> float:
        """Return the remaining seconds, at least 0."""
        return max(0.0, self._expires_at - time.monotonic())

    def reset(self) -> None:
        """Restart the time limit."""
        self._expires_at = time.monotonic() + self.timeout_s


def retry_delay_s(
    attempt: int, error: ServiceError, *, retries: int, remaining_s: float, jitter: float
) -> float | None:
    """Return the delay before the next attempt; None if there is none.

    The delay is the endpoint's Retry-After plus an exponential backoff with full jitter, so that
    clients which failed at the same time do not retry at the same time.

    Args:
        attempt: Index of the failed attempt, from 0.
        error: Its error.
        retries: Maximum number of attempts after the first.
        remaining_s: Seconds until the deadline; there is no attempt after it.
        jitter: A new random number in [0, 1).
    """
    if not isinstance(error, RetryableError) or attempt >= retries:
        return None
    bound = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** min(attempt, 16))
    delay_s = (error.retry_after_s or 0.0) + jitter * bound
    return delay_s if delay_s < remaining_s else None


def parse_retry_after(text: str | None) -> float | None:
    """Parse a Retry-After header in seconds; None for anything else.

    A date is not parsed: it assumes that the clocks of client and endpoint agree.
    """
    if text is None or not text.isascii() or not text.strip().isdecimal() or len(text) > 9:
        return None
    return min(float(text), _MAX_RETRY_AFTER_S)


def connection_error(error: httpx2.TransportError, url: str) -> ServiceError:
    """Return the error for a failed transfer; retryable unless it cannot succeed later."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol):
        return ServiceError("unreachable", f"{url}: {reason}")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ServiceError("unreachable", f"{url}: {cause.verify_message}")
        cause = cause.__cause__ or cause.__context__
    return RetryableError("unreachable", f"{url}: {reason}")
