"""Error codes of the API and their responses, problem details of RFC 9457."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from loraseg.errors import AdapterNotFoundError, ServiceError

__all__ = [
    "MEDIA_TYPE",
    "PROBLEM_TYPES",
    "ProblemType",
    "as_service_error",
    "problem_details",
    "problem_response",
]

MEDIA_TYPE = "application/problem+json"
_MAX_DETAIL_CHARS = 1000


@dataclass(frozen=True, slots=True)
class ProblemType:
    """HTTP status and title of an error code."""

    status: int
    title: str


PROBLEM_TYPES: Mapping[str, ProblemType] = {
    "bad_request": ProblemType(400, "The request is malformed"),
    "unauthorized": ProblemType(401, "A valid bearer token is needed"),
    "forbidden": ProblemType(403, "The token does not allow this"),
    "not_found": ProblemType(404, "There is no resource at this path"),
    "no_such_library": ProblemType(404, "No library of that name is served"),
    "no_such_adapter": ProblemType(404, "The library has no adapter of that name"),
    "method_not_allowed": ProblemType(405, "The path does not support this method"),
    "body_timeout": ProblemType(408, "The body did not arrive in time"),
    "body_too_large": ProblemType(413, "The body is larger than the service accepts"),
    "unsupported_media_type": ProblemType(415, "The body has an unsupported media type"),
    "bad_image": ProblemType(422, "The image cannot be used"),
    "invalid": ProblemType(422, "A parameter is wrong"),
    "too_many_requests": ProblemType(429, "Too many requests of this token are running"),
    "internal": ProblemType(500, "A fault of the service"),
    "adapters_unavailable": ProblemType(503, "Adapters cannot be loaded at present"),
    "draining": ProblemType(503, "The service is shutting down"),
    "not_ready": ProblemType(503, "Models or catalogs are still being loaded"),
    "overloaded": ProblemType(503, "The queue of the service is full"),
    "replica_lost": ProblemType(503, "The replica that processed the request was lost"),
    "deadline": ProblemType(504, "The request was not finished in time"),
}
# Retry-After of errors with status 429 or 503 that do not specify it.
_RETRY_AFTER_S = 1.0


def as_service_error(error: Exception) -> ServiceError:
    """Return the error for the client; it has no detail if the service is at fault."""
    if isinstance(error, ServiceError) and error.code in PROBLEM_TYPES:
        return error
    if isinstance(error, AdapterNotFoundError):
        return ServiceError("no_such_adapter", str(error))
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
            return ServiceError(code, PROBLEM_TYPES[code].title)
    return ServiceError("internal", "The request failed; the log of the service has the reason.")


def problem_details(error: ServiceError, request_id: str) -> dict[str, Any]:
    """Return the problem details (RFC 9457, section 3.1) of an error."""
    problem_type = PROBLEM_TYPES[error.code]
    return {
        "type": f"urn:loraseg:problem:{error.code}",
        "title": problem_type.title,
        "status": problem_type.status,
        "detail": str(error)[:_MAX_DETAIL_CHARS],
        "code": error.code,
        "request_id": request_id,
    }


def problem_response(error: ServiceError, request_id: str, **members: Any) -> Response:
    """Return the response for an error; ``members`` are added to the problem details."""
    content = {**problem_details(error, request_id), **members}
    status = PROBLEM_TYPES[error.code].status
    headers = {"Cache-Control": "no-store"}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="loraseg"'
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        seconds = _RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["Retry-After"] = str(max(1, math.ceil(min(seconds, 3600))))
    return Response(json.dumps(content), status, headers, media_type=MEDIA_TYPE)
