"""Retries of S3 requests after transient failures."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import botocore.exceptions
import botocore.parsers
import urllib3.exceptions

from loraseg.storage.backoff import backoff_s

__all__ = ["REQUEST_ERRORS", "error_code", "retry_call"]

logger = logging.getLogger(__name__)

_INITIAL_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_WARN_AFTER_S = 5.0

_TRANSIENT_STATUSES = {409, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "BadDigest",  # damaged in transfer, as are the next two
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    "ConditionalRequestConflict",
    "OperationAborted",
    "InternalError",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_TRANSIENT_ERRORS = (
    botocore.exceptions.ConnectionError,  # not connected
    botocore.exceptions.HTTPClientError,  # closed, timed out, broken
    botocore.exceptions.IncompleteReadError,
    botocore.parsers.ResponseParserError,  # truncated XML
    urllib3.exceptions.HTTPError,
    OSError,
)

# Errors of a request that are caused outside this process.
REQUEST_ERRORS = (
    botocore.exceptions.ClientError,
    botocore.exceptions.BotoCoreError,
    botocore.parsers.ResponseParserError,
    urllib3.exceptions.HTTPError,
    OSError,
)

ResultT = TypeVar("ResultT")


def retry_call(request: Callable[[], ResultT], timeout_s: float, description: str) -> ResultT:
    """Call ``request`` until it succeeds, fails permanently or ``timeout_s`` seconds have passed.

    Args:
        request: Must be safe to repeat if an earlier call succeeded and its response was lost.
        timeout_s: Counted from the first call; a running call is not interrupted.
        description: Operation and URI, for the log.

    Raises:
        Exception: The last one, of :data:`REQUEST_ERRORS`.
    """
    started = time.monotonic()
    attempt, has_warned = 0, False
    while True:
        try:
            return request()
        except REQUEST_ERRORS as error:
            pause = backoff_s(attempt, _INITIAL_BACKOFF_S, _MAX_BACKOFF_S)
            waited = time.monotonic() - started
            if not _is_transient(error) or waited + pause > timeout_s:
                raise
            if waited + pause > _WARN_AFTER_S and not has_warned:
                reason = error_code(error) or type(error).__name__
                left = timeout_s - waited
                logger.warning("%s: failed (%s); retrying for %.0f s", description, reason, left)
                has_warned = True
        time.sleep(pause)
        attempt += 1


def error_code(error: Exception) -> str:
    """Return the error code of the server; "" if the error is not from the server."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _is_transient(error: Exception) -> bool:
    if isinstance(error, botocore.exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _TRANSIENT_STATUSES or error_code(error) in _TRANSIENT_CODES
    if isinstance(error, botocore.exceptions.SSLError):
        return False  # certificates do not change by retrying
    return isinstance(error, _TRANSIENT_ERRORS)
