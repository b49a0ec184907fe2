"""Headers of ASGI messages."""

import re
import uuid
from collections.abc import Iterable

from starlette.types import Scope

__all__ = ["REQUEST_ID", "header", "request_id"]

REQUEST_ID = b"x-request-id"
_VALID_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return the first value of a header, whose ``name`` is in lower case; None without one."""
    return next((value for key, value in headers if key.lower() == name), None)


def request_id(scope: Scope) -> str:
    """Return the X-Request-ID of a request, or a new id if it is missing or invalid."""
    value = header(scope["headers"], REQUEST_ID)
    if value is not None and _VALID_REQUEST_ID.fullmatch(value):
        return value.decode()
    return uuid.uuid4().hex
