"""Parse replies: types, sizes and ranges are checked before a value is used."""

import base64
import binascii
from dataclasses import dataclass, fields
from functools import cache
from http import HTTPStatus
from typing import Any, TypeVar

import numpy as np
import pydantic_core
from numpy import ndarray
from pydantic import TypeAdapter, ValidationError

from loraseg.api_types import Problem, ReplyExplanation, SegmentReply, printable
from loraseg.client.images import Upload, decode_map
from loraseg.client.responses import SegmentResponse
from loraseg.client.retry import RetryableError
from loraseg.errors import ServiceError

__all__ = [
    "BatchLine",
    "invalid_response",
    "parse",
    "parse_object",
    "parse_segment_response",
    "problem_error",
    "response_error",
]

ReplyT = TypeVar("ReplyT")

_RETRYABLE_STATUSES = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
# For responses of something in front of the endpoint, such as a proxy.
_CODE_BY_STATUS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "too_many_requests",
    500: "internal",
    503: "overloaded",
    504: "deadline",
}
_MAX_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class BatchLine:
    """What the client reads first of a line of a batch response.

    Attributes:
        index: Of the image in the request; None in the last line.
        error: Why the image was not segmented; None if it was.
        done: Number of segmented images, in the last line only.
    """

    index: int | None = None
    error: Problem | None = None
    done: int | None = None


def invalid_response(reason: str) -> ServiceError:
    """Return the error for a response that violates the API."""
    return ServiceError("bad_reply", f"the endpoint's response is invalid: {reason}")


def parse(body: bytes, cls: type[ReplyT]) -> ReplyT:
    """Parse a JSON body strictly; unknown keys are ignored.

    Args:
        body: UTF-8.
        cls: One of :mod:`loraseg.api_types`.

    Raises:
        ServiceError: ``bad_reply``; the message names the key.
    """
    try:
        return _type_adapter(cls).validate_json(body, strict=True)
    except ValidationError as error:
        raise invalid_response(_first_error(error, body)) from error


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object of any members, without NaN and infinities.

    Raises:
        ServiceError: ``bad_reply``.
    """
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid_response(_not_json(body)) from error
    if not isinstance(value, dict):
        raise invalid_response(f"got {type(value).__name__}, expected an object")
    return value


def problem_error(problem: Problem, retry_after_s: float | None = None) -> ServiceError:
    """Return the error that problem details (RFC 9457) stand for.

    Args:
        problem: The details.
        retry_after_s: From the header.

    Returns:
        A :class:`RetryableError` for statuses 429 and 503.
    """
    detail = problem.detail
    if problem.code == "internal":  # the endpoint's log has the reason under this id
        detail = f"{detail} (request {problem.request_id})"
    kind = RetryableError if problem.status in _RETRYABLE_STATUSES else ServiceError
    return kind(problem.code, detail, retry_after_s=retry_after_s)


def response_error(status: int, body: bytes, retry_after_s: float | None) -> ServiceError:
    """Return the error that an HTTP status other than 200 stands for.

    Args:
        status: Of HTTP.
        body: Problem details, or the text of a proxy.
        retry_after_s: From the header.
    """
    try:
        return problem_error(parse(body, Problem), retry_after_s)
    except ServiceError:
        detail = f"HTTP status {status} without a reason; is this the URL of a loraseg endpoint?"
        kind = RetryableError if status in _RETRYABLE_STATUSES else ServiceError
        return kind(_CODE_BY_STATUS.get(status, "bad_reply"), detail, retry_after_s=retry_after_s)


def parse_segment_response(body: bytes, upload: Upload, classes: int) -> SegmentResponse:
    """Parse the reply for one image.

    Args:
        body: JSON.
        upload: The image of the request, for its size.
        classes: Number of class names in the request.

    Raises:
        ServiceError: ``bad_reply``: a value is missing, mistyped or out of range, or does not fit
            the request.
    """
    reply = parse(body, SegmentReply)
    for name, count in (("classes", len(reply.classes)), ("palette", len(reply.palette))):
        if count != classes:
            raise invalid_response(f"{name}: got {count}, expected {classes}")
    labels = _decode("segmentation_mask", reply.segmentation_mask, upload.shapes)
    if int(labels.max()) >= classes:
        raise invalid_response(f"segmentation_mask: id {int(labels.max())} of {classes} classes")
    explanation = {field.name: getattr(reply, field.name) for field in fields(ReplyExplanation)}
    return SegmentResponse(
        label_map=labels,
        class_names=reply.classes,
        palette=np.array(reply.palette, dtype=np.uint8),
        confidence=_decode_scores("confidence", reply.confidence, labels),
        entropy=_decode_scores("entropy", reply.entropy, labels),
        request_id=reply.request_id,
        **explanation,
    )


@cache
def _type_adapter(cls: type) -> Any:
    return TypeAdapter(cls)


def _decode_scores(name: str, png: str | None, labels: ndarray) -> ndarray | None:
    """Decode a map of the label map's size to float32 (h, w) in [0, 1]."""
    if png is None:
        return None
    height, width = labels.shape
    values = _decode(name, png, frozenset({(height, width)}))
    return values.astype(np.float32) / np.float32(255)


def _decode(name: str, png: str, shapes: frozenset[tuple[int, int]]) -> ndarray:
    try:
        return decode_map(base64.b64decode(png, validate=True), shapes)
    except (ValueError, binascii.Error) as error:
        raise invalid_response(f"{name}: {error}") from error


def _first_error(error: ValidationError, body: bytes) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    if problem["type"] == "json_invalid":
        return _not_json(body)
    path = printable(".".join(str(part) for part in problem["loc"]))
    got = printable(repr(problem["input"]))[:_MAX_SHOWN_CHARS]
    return f"{path}: {problem['msg']}, got {got}" if path else f"{problem['msg']}, got {got}"


def _not_json(body: bytes) -> str:
    return f"not JSON ({printable(body[:_MAX_SHOWN_CHARS].decode('latin-1'))!r} ...)"
