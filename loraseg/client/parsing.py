"""Read answers: nothing in them is believed before its type, size and range are checked."""

import base64
import binascii
import json
import sys
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, cast

import numpy as np
from numpy import ndarray

from loraseg.client.images import Upload, decode_map
from loraseg.client.responses import (
    AdapterInfo,
    LibraryInfo,
    SegmentResponse,
    SkippedAdapterInfo,
    UsedAdapterInfo,
)
from loraseg.client.retry import RetryableError
from loraseg.errors import ServiceError

__all__ = [
    "JsonObject",
    "invalid_response",
    "parse_adapter",
    "parse_json",
    "parse_library",
    "parse_segment_response",
    "problem_error",
    "response_error",
]

_MAX_TEXT_CHARS = 2000
_MAX_FLOAT = sys.float_info.max
_RETRYABLE_STATUSES = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
# For answers that come from something before the endpoint, such as a proxy.
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


def invalid_response(reason: str) -> ServiceError:
    """Return the error for an answer that no sound endpoint gives."""
    return ServiceError("bad_reply", f"the endpoint's answer cannot be used: {reason}")


class JsonObject:
    """A JSON object whose values are taken out by type; the error names the key."""

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, Mapping):
            raise invalid_response(
                f"{path or 'the answer'}: got {type(value).__name__}, expected object"
            )
        self._values = cast(Mapping[str, Any], value)
        self._path_prefix = path

    def string(self, key: str, *, optional: bool = False) -> Any:
        """Return printable text; None where it is absent and optional."""
        value = self._values.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, str):
            raise self._type_error(key, value, "text")
        return sanitise(value)

    def number(self, key: str, *, optional: bool = False) -> Any:
        """Return a finite number as float; None where it is absent and optional."""
        value = self._values.get(key)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._type_error(key, value, "a number")
        if not abs(value) <= _MAX_FLOAT:  # neither NaN nor what no float holds
            raise self._type_error(key, value, "a finite number")
        return float(value)

    def integer(self, key: str, *, optional: bool = False) -> Any:
        """Return an integer; None where it is absent and optional."""
        value = self._values.get(key)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._type_error(key, value, "a whole number")
        return value

    def version(self, key: str) -> int | str:
        """Return a version: a number or text."""
        return self.string(key) if isinstance(self._values.get(key), str) else self.integer(key)

    def array(self, key: str) -> Sequence[Any]:
        """Return a list of anything."""
        value = self._values.get(key)
        if not isinstance(value, list):
            raise self._type_error(key, value, "a list")
        return cast(list[Any], value)

    def children(self, key: str) -> list["JsonObject"]:
        """Return a list of objects."""
        return [JsonObject(value, self._key_path(key)) for value in self.array(key)]

    def child(self, key: str) -> "JsonObject":
        """Return an object."""
        return JsonObject(self._values.get(key), self._key_path(key))

    def strings(self, key: str) -> tuple[str, ...]:
        """Return a list of printable texts."""
        values = self.array(key)
        if not all(isinstance(value, str) for value in values):
            raise self._type_error(key, "something else", "a list of texts")
        return tuple(sanitise(value) for value in values)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, unchecked."""
        return dict(self._values)

    def number_values(self) -> dict[str, float]:
        """Return all values as finite numbers by key."""
        return {sanitise(key): self.number(key) for key in self._values}

    def has(self, key: str) -> bool:
        """Tell whether the key is there and not null."""
        return self._values.get(key) is not None

    def image(self, key: str, shapes: frozenset[tuple[int, int]]) -> ndarray:
        """Return a base64 PNG of one of these shapes as uint8 (h, w)."""
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self._type_error(key, value, "a PNG in base64")
        try:
            return decode_map(base64.b64decode(value, validate=True), shapes)
        except (ValueError, binascii.Error) as error:
            raise invalid_response(f"{self._key_path(key)}: {error}") from error

    def _key_path(self, key: str) -> str:
        return f"{self._path_prefix}.{key}" if self._path_prefix else key

    def _type_error(self, key: str, value: Any, expected: str) -> ServiceError:
        return invalid_response(
            f"{self._key_path(key)}: got {sanitise(repr(value))[:60]}, expected {expected}"
        )


def parse_json(body: bytes) -> Any:
    """Parse JSON without NaN and infinities.

    Raises:
        ServiceError: ``invalid_response``.
    """
    try:
        return json.loads(body, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise invalid_response(
            f"not JSON ({sanitise(body[:60].decode('latin-1'))!r} ...)"
        ) from error


def problem_error(details: JsonObject, retry_after_s: float | None = None) -> ServiceError:
    """Return the error that problem details (RFC 9457) stand for; passing ones may be retried.

    Args:
        details: The details.
        retry_after_s: From the header.
    """
    code, detail = details.string("code"), details.string("detail")
    if code == "internal":  # whoever runs the endpoint finds the reason in its log by this
        detail = f"{detail} (request {details.string('request_id')})"
    kind = RetryableError if details.integer("status") in _RETRYABLE_STATUSES else ServiceError
    return kind(code, detail, retry_after_s=retry_after_s)


def response_error(status: int, body: bytes, retry_after_s: float | None) -> ServiceError:
    """Return the error that an HTTP status other than 200 stands for.

    Args:
        status: Of HTTP.
        body: Problem details, or whatever a proxy on the way has to say.
        retry_after_s: From the header.
    """
    try:
        return problem_error(JsonObject(parse_json(body)), retry_after_s)
    except ServiceError:
        detail = f"HTTP status {status} without a reason; is this the URL of a loraseg endpoint?"
        kind = RetryableError if status in _RETRYABLE_STATUSES else ServiceError
        return kind(_CODE_BY_STATUS.get(status, "bad_reply"), detail, retry_after_s=retry_after_s)


def parse_segment_response(
    json_object: JsonObject, upload: Upload, classes: int
) -> SegmentResponse:
    """Read one segmented image.

    Args:
        json_object: The JSON reply.
        upload: What was sent, for the sizes.
        classes: How many class names were sent.

    Raises:
        ServiceError: ``invalid_response``: anything is missing, mistyped, or of a size or range
            that does not belong to the question.
    """
    names = json_object.strings("classes")
    if len(names) != classes:
        raise invalid_response(f"classes: got {len(names)}, expected {classes}")
    labels = json_object.image("segmentation_mask", upload.shapes)
    if int(labels.max()) >= classes:
        raise invalid_response(f"segmentation_mask: id {int(labels.max())} of {classes} classes")
    same_shape = frozenset({(labels.shape[0], labels.shape[1])})
    maps = {
        name: json_object.image(name, same_shape).astype(np.float32) / np.float32(255)
        for name in ("confidence", "entropy")
        if json_object.has(name)
    }
    return SegmentResponse(
        label_map=labels,
        class_names=names,
        palette=_parse_palette(json_object.array("palette"), classes),
        confidence=maps.get("confidence"),
        entropy=maps.get("entropy"),
        mode=json_object.string("mode"),
        library=json_object.string("library"),
        generation=json_object.integer("generation", optional=True),
        base=json_object.string("base"),
        mix=json_object.string("mix", optional=True),
        adapters=tuple(_parse_used_adapter(node) for node in json_object.children("adapters")),
        fallback=json_object.string("fallback", optional=True),
        skipped=tuple(_parse_skipped_adapter(node) for node in json_object.children("skipped")),
        tiles=json_object.integer("tiles"),
        timing_ms=json_object.child("timing_ms").number_values(),
        request_id=json_object.string("request_id"),
    )


def parse_adapter(json_object: JsonObject) -> AdapterInfo:
    """Read one adapter of the list."""
    return AdapterInfo(
        name=json_object.string("name"),
        version=json_object.integer("version"),
        digest=json_object.string("digest"),
        size_bytes=json_object.integer("size_bytes"),
        classes=json_object.strings("classes"),
        images=json_object.integer("images", optional=True),
        unavailable=json_object.string("unavailable", optional=True),
    )


def parse_library(json_object: JsonObject) -> LibraryInfo:
    """Read the state of a library."""
    return LibraryInfo(
        library=json_object.string("library"),
        generation=json_object.integer("generation"),
        loaded_s=json_object.number("loaded_s"),
        checked_s=json_object.number("checked_s"),
        problem=json_object.string("problem", optional=True),
        adapters=json_object.integer("adapters"),
        unavailable=json_object.integer("unavailable"),
        misfits=json_object.integer("misfits"),
    )


def sanitise(text: str) -> str:
    """Keep what a terminal shows as text: an endpoint must not steer it."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return shown if len(shown) <= _MAX_TEXT_CHARS else f"{shown[:_MAX_TEXT_CHARS]} ..."


def _parse_used_adapter(json_object: JsonObject) -> UsedAdapterInfo:
    return UsedAdapterInfo(
        json_object.string("name"),
        json_object.version("version"),
        json_object.string("digest"),
        json_object.number("weight"),
        json_object.number("distance", optional=True),
    )


def _parse_skipped_adapter(json_object: JsonObject) -> SkippedAdapterInfo:
    return SkippedAdapterInfo(
        json_object.string("name"),
        json_object.version("version"),
        json_object.string("digest"),
        json_object.string("reason"),
    )


def _parse_palette(colors: Sequence[Any], classes: int) -> ndarray:
    try:
        palette = np.array(colors, dtype=np.uint8)
    except (ValueError, TypeError, OverflowError) as error:
        raise invalid_response(f"palette: {error}") from error
    if palette.shape != (classes, 3):
        raise invalid_response(f"palette: got shape {palette.shape}, expected {(classes, 3)}")
    return palette


def _reject_constant(name: str) -> Any:
    raise ValueError(name)
