"""JSON with stable bytes, and strict parsing of JSON that comes from outside.

Digests and stored keys depend on the bytes of :func:`canonical_json` and :func:`readable_json`.
Parsing refuses what JSON does not define or leaves ambiguous: NaN, infinities, duplicate keys.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from loraseg.errors import LorasegError

__all__ = ["canonical_json", "parse_json", "parse_json_as", "parse_json_object", "readable_json"]

T = TypeVar("T")

_MAX_SHOWN_CHARACTERS = 80
_validator = functools.cache(TypeAdapter)
_MESSAGES = {
    "missing": "is missing",
    "unexpected_keyword_argument": "is not a known key",
    "extra_forbidden": "is not a known key",
}


def canonical_json(values: Any) -> bytes:
    """Return ASCII JSON with sorted keys and no spaces; equal values give equal bytes.

    Raises:
        ValueError: A number is not finite.
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def readable_json(values: Any) -> bytes:
    """Return UTF-8 JSON with sorted keys, one value per line; equal values give equal bytes."""
    return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def parse_json(data: bytes, where: str, *, max_bytes: int, error: type[LorasegError]) -> Any:
    """Parse untrusted JSON.

    Args:
        data: UTF-8 text.
        where: The name of the file, for messages.
        max_bytes: Largest accepted size.
        error: The class to raise.

    Raises:
        LorasegError: Of class ``error``: the text is too large, not JSON, nested too deeply, or
            has NaN, an infinity or an object with a duplicate key.
    """
    if len(data) > max_bytes:
        raise error(f"{where}: got {len(data)} bytes, expected at most {max_bytes}")
    try:
        return json.loads(
            data.decode(),
            parse_constant=_reject_constant,
            object_pairs_hook=_reject_duplicate_keys,
        )
    except (ValueError, RecursionError) as cause:
        raise error(f"{where}: not valid JSON: {cause}") from cause


def parse_json_object(
    data: bytes, where: str, *, max_bytes: int, error: type[LorasegError]
) -> dict[str, Any]:
    """Parse untrusted JSON whose top level is an object; arguments as in :func:`parse_json`.

    Raises:
        LorasegError: As in :func:`parse_json`, or the top level is not an object.
    """
    values = parse_json(data, where, max_bytes=max_bytes, error=error)
    if not isinstance(values, dict):
        raise error(f"{where}: got {type(values).__name__}, expected a JSON object")
    return cast(dict[str, Any], values)


def parse_json_as(
    kind: type[T],
    data: bytes,
    where: str,
    *,
    max_bytes: int,
    error: type[LorasegError],
    version: tuple[str, Any] | None = None,
) -> T:
    """Parse untrusted JSON into a type, without conversions (``1`` is not a ``str`` or ``bool``).

    Args:
        kind: A dataclass. Pydantic's annotations and ``__pydantic_config__`` count.
        data: As in :func:`parse_json`, and so the next three.
        where: The name of the file.
        max_bytes: Largest accepted size.
        error: The class to raise.
        version: A key of the object and its required value, checked before all other keys.

    Raises:
        LorasegError: Of class ``error``: as in :func:`parse_json_object`, the version differs, or
            a value has another type or is out of range.
    """
    values = parse_json_object(data, where, max_bytes=max_bytes, error=error)
    if version is not None and _differs(values.get(version[0]), version[1]):
        key, expected = version
        raise error(
            f"{where}: {key} {_shown(values.get(key))}; this version of loraseg reads {expected!r}"
        )
    try:
        return _validator(kind).validate_json(data, strict=True)
    except ValidationError as cause:
        raise error(f"{where}: {_describe(cause)}") from cause


def _differs(actual: Any, expected: Any) -> bool:
    return type(actual) is not type(expected) or actual != expected


def _describe(cause: ValidationError) -> str:
    first = cause.errors(include_url=False)[0]
    location = ".".join(map(str, first["loc"]))
    prefix = f"{location}: " if location else ""
    context: Mapping[str, Any] = first.get("ctx", {})
    if first["type"] == "json_invalid":  # such as half of a surrogate pair
        return f"not valid JSON: {context['error']}"
    if first["type"] == "value_error":  # raised by a check of our own, with a full message
        return f"{prefix}{context['error']}"
    if first["type"] in _MESSAGES:
        return f"{location} {_MESSAGES[first['type']]}"
    subject, _, expected = first["msg"].partition(" should be ")
    if subject == "Input":
        return f"{prefix}got {_shown(first['input'])}, expected {expected}"
    return f"{prefix}got {_shown(first['input'])}: {first['msg']}"


def _shown(value: Any) -> str:
    text = repr(value)
    shortened = text[:_MAX_SHOWN_CHARACTERS]
    return shortened if shortened == text else f"{shortened}..."


def _reject_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:_MAX_SHOWN_CHARACTERS]!r} appears twice")
            seen.add(key)
    return values
