# pyright: basic
"""Which failures of an S3 request pass by themselves, and how long that is waited for."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import botocore.exceptions
import botocore.parsers
import urllib3.exceptions

from loraseg.storage.backoff import backoff_s

__all__ = ["FAILURES", "error_code", "persist"]

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_SILENT_S = 5.0

_PASSING_STATUS = {409, 429, 500, 502, 503, 504}
_PASSING_CODES = {
    "BadDigest",  # the body was damaged on its way, as with the next two
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
_BROKEN_TRANSFER = (
    botocore.exceptions.ConnectionError,  # none could be made
    botocore.exceptions.HTTPClientError,  # closed, timed out, broken
    botocore.exceptions.IncompleteReadError,
    botocore.parsers.ResponseParserError,  # an answer cut off in its XML
    urllib3.exceptions.HTTPError,
    OSError,
)

# All that a request can raise for a reason outside this programme.
FAILURES = (
    botocore.exceptions.ClientError,
    botocore.exceptions.BotoCoreError,
    botocore.parsers.ResponseParserError,
    urllib3.exceptions.HTTPError,
    OSError,
)

ResultT = TypeVar("ResultT")


def persist(request: Callable[[], ResultT], patience_s: float, what: str) -> ResultT:
    """Call ``request`` until it succeeds, fails for good, or ``patience_s`` seconds are over.

    Args:
        request: Safe to repeat even if an earlier call was carried out and its answer lost.
        patience_s: Counted from the first call; a call that is under way is not broken off.
        what: What is being done and where, for the log.

    Raises:
        Exception: The last one of :data:`FAILURES`.
    """
    started = time.monotonic()
    attempt, has_spoken = 0, False
    while True:
        try:
            return request()
        except FAILURES as error:
            pause = backoff_s(attempt, _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
            waited = time.monotonic() - started
            if not _passes(error) or waited + pause > patience_s:
                raise
            if waited + pause > _SILENT_S and not has_spoken:
                reason = error_code(error) or type(error).__name__
                left = patience_s - waited
                logger.warning("%s: no success yet (%s); for %.0f s more", what, reason, left)
                has_spoken = True
        time.sleep(pause)
        attempt += 1


def error_code(error: Exception) -> str:
    """Return the server's code, "" for what did not come from the server."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _passes(error: Exception) -> bool:
    if isinstance(error, botocore.exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _PASSING_STATUS or error_code(error) in _PASSING_CODES
    if isinstance(error, botocore.exceptions.SSLError):
        return False  # a wrong certificate stays wrong
    return isinstance(error, _BROKEN_TRANSFER)
