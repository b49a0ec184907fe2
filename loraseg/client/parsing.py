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

from loraseg.client.pictures import Upload, decode_map
from loraseg.client.reply import AdapterInfo, LibraryInfo, Reply, SkippedAdapter, UsedAdapter
from loraseg.client.retry import PassingError
from loraseg.errors import ServiceError

__all__ = [
    "Node",
    "bad_reply",
    "parse_adapter",
    "parse_json",
    "parse_library",
    "parse_reply",
    "problem",
    "refusal",
]

_LONGEST_TEXT = 2000
_LARGEST = sys.float_info.max
_PASSING = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
# For answers that come from something before the endpoint, such as a proxy.
_CODES = {
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


def bad_reply(what: str) -> ServiceError:
    """Return the error for an answer that no sound endpoint gives."""
    return ServiceError("bad_reply", f"the endpoint's answer cannot be used: {what}")


class Node:
    """A JSON object whose values are taken out by type; the error names the key."""

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, Mapping):
            raise bad_reply(f"{where or 'the answer'}: got {type(value).__name__}, expected object")
        self._values = cast(Mapping[str, Any], value)
        self._where = where

    def text(self, key: str, *, optional: bool = False) -> Any:
        """Return printable text; None where it is absent and optional."""
        value = self._values.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, str):
            raise self._wrong(key, value, "text")
        return clean(value)

    def number(self, key: str, *, optional: bool = False) -> Any:
        """Return a finite number as float; None where it is absent and optional."""
        value = self._values.get(key)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        if not abs(value) <= _LARGEST:  # neither NaN nor what no float holds
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def whole(self, key: str, *, optional: bool = False) -> Any:
        """Return an integer; None where it is absent and optional."""
        value = self._values.get(key)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "a whole number")
        return value

    def version(self, key: str) -> int | str:
        """Return a version: a number or text."""
        return self.text(key) if isinstance(self._values.get(key), str) else self.whole(key)

    def items(self, key: str) -> Sequence[Any]:
        """Return a list of anything."""
        value = self._values.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list")
        return cast(list[Any], value)

    def nodes(self, key: str) -> list["Node"]:
        """Return a list of objects."""
        return [Node(value, self._path(key)) for value in self.items(key)]

    def node(self, key: str) -> "Node":
        """Return an object."""
        return Node(self._values.get(key), self._path(key))

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of printable texts."""
        values = self.items(key)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "something else", "a list of texts")
        return tuple(clean(value) for value in values)

    def values(self) -> dict[str, Any]:
        """Return all of it, unchecked."""
        return dict(self._values)

    def numbers(self) -> dict[str, float]:
        """Return all values as finite numbers by key."""
        return {clean(key): self.number(key) for key in self._values}

    def has(self, key: str) -> bool:
        """Tell whether the key is there and not null."""
        return self._values.get(key) is not None

    def picture(self, key: str, shapes: frozenset[tuple[int, int]]) -> ndarray:
        """Return a base64 PNG of one of these shapes as uint8 (h, w)."""
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a PNG in base64")
        try:
            return decode_map(base64.b64decode(value, validate=True), shapes)
        except (ValueError, binascii.Error) as error:
            raise bad_reply(f"{self._path(key)}: {error}") from error

    def _path(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _wrong(self, key: str, value: Any, expected: str) -> ServiceError:
        return bad_reply(f"{self._path(key)}: got {clean(repr(value))[:60]}, expected {expected}")


def parse_json(body: bytes) -> Any:
    """Parse JSON without NaN and infinities.

    Raises:
        ServiceError: ``bad_reply``.
    """
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_reply(f"not JSON ({clean(body[:60].decode('latin-1'))!r} ...)") from error


def problem(told: Node, retry_after_s: float | None = None) -> ServiceError:
    """Return the error that problem details (RFC 9457) stand for; passing ones may be retried.

    Args:
        told: The details.
        retry_after_s: From the header.
    """
    code, detail = told.text("code"), told.text("detail")
    if code == "internal":  # whoever runs the endpoint finds the reason in its log by this
        detail = f"{detail} (request {told.text('request_id')})"
    kind = PassingError if told.whole("status") in _PASSING else ServiceError
    return kind(code, detail, retry_after_s=retry_after_s)


def refusal(status: int, body: bytes, retry_after_s: float | None) -> ServiceError:
    """Return the error that an HTTP status other than 200 stands for.

    Args:
        status: Of HTTP.
        body: Problem details, or whatever a proxy on the way has to say.
        retry_after_s: From the header.
    """
    try:
        return problem(Node(parse_json(body)), retry_after_s)
    except ServiceError:
        detail = f"HTTP status {status} without a reason; is this the URL of a loraseg endpoint?"
        kind = PassingError if status in _PASSING else ServiceError
        return kind(_CODES.get(status, "bad_reply"), detail, retry_after_s=retry_after_s)


def parse_reply(told: Node, upload: Upload, classes: int) -> Reply:
    """Read one segmented image.

    Args:
        told: The JSON reply.
        upload: What was sent, for the sizes.
        classes: How many class names were sent.

    Raises:
        ServiceError: ``bad_reply``: anything is missing, mistyped, or of a size or range that
            does not belong to the question.
    """
    names = told.texts("classes")
    if len(names) != classes:
        raise bad_reply(f"classes: got {len(names)}, expected {classes}")
    labels = told.picture("segmentation_mask", upload.shapes)
    if int(labels.max()) >= classes:
        raise bad_reply(f"segmentation_mask: id {int(labels.max())} of {classes} classes")
    same_shape = frozenset({(labels.shape[0], labels.shape[1])})
    maps = {
        name: told.picture(name, same_shape).astype(np.float32) / np.float32(255)
        for name in ("confidence", "entropy")
        if told.has(name)
    }
    return Reply(
        label_map=labels,
        class_names=names,
        palette=_palette(told.items("palette"), classes),
        confidence=maps.get("confidence"),
        entropy=maps.get("entropy"),
        mode=told.text("mode"),
        library=told.text("library"),
        generation=told.whole("generation", optional=True),
        base=told.text("base"),
        mix=told.text("mix", optional=True),
        adapters=tuple(_used(node) for node in told.nodes("adapters")),
        fallback=told.text("fallback", optional=True),
        skipped=tuple(_skipped(node) for node in told.nodes("skipped")),
        tiles=told.whole("tiles"),
        timing_ms=told.node("timing_ms").numbers(),
        request_id=told.text("request_id"),
    )


def parse_adapter(told: Node) -> AdapterInfo:
    """Read one adapter of the list."""
    return AdapterInfo(
        name=told.text("name"),
        version=told.whole("version"),
        digest=told.text("digest"),
        size_bytes=told.whole("size_bytes"),
        classes=told.texts("classes"),
        images=told.whole("images", optional=True),
        unavailable=told.text("unavailable", optional=True),
    )


def parse_library(told: Node) -> LibraryInfo:
    """Read the state of a library."""
    return LibraryInfo(
        library=told.text("library"),
        generation=told.whole("generation"),
        loaded_s=told.number("loaded_s"),
        checked_s=told.number("checked_s"),
        problem=told.text("problem", optional=True),
        adapters=told.whole("adapters"),
        unavailable=told.whole("unavailable"),
        misfits=told.whole("misfits"),
    )


def clean(text: str) -> str:
    """Keep what a terminal shows as text: an endpoint must not steer it."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return shown if len(shown) <= _LONGEST_TEXT else f"{shown[:_LONGEST_TEXT]} ..."


def _used(told: Node) -> UsedAdapter:
    return UsedAdapter(
        told.text("name"),
        told.version("version"),
        told.text("digest"),
        told.number("weight"),
        told.number("distance", optional=True),
    )


def _skipped(told: Node) -> SkippedAdapter:
    return SkippedAdapter(
        told.text("name"), told.version("version"), told.text("digest"), told.text("reason")
    )


def _palette(colors: Sequence[Any], classes: int) -> ndarray:
    try:
        palette = np.array(colors, dtype=np.uint8)
    except (ValueError, TypeError, OverflowError) as error:
        raise bad_reply(f"palette: {error}") from error
    if palette.shape != (classes, 3):
        raise bad_reply(f"palette: got shape {palette.shape}, expected {(classes, 3)}")
    return palette


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)
