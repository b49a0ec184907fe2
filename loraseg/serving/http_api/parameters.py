"""Parse and check the parameters of a request, from query and form."""

import difflib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, DatasetError, ServiceError
from loraseg.inference.request import MapName
from loraseg.inference.selection import AdapterMode, AdapterQuery, TilingMode
from loraseg.inference.service_errors import no_such_library_error
from loraseg.segment.open_vocabulary.base import check_classes
from loraseg.serving.config import Limits, ServiceConfig

__all__ = [
    "MAX_TOP_K",
    "MODES",
    "PARAMETERS",
    "RETURNS",
    "TILINGS",
    "ParameterParser",
    "SegmentParameters",
    "unique_parameters",
]

MODES = ("fused", "base", "uniform")
TILINGS = get_args(TilingMode)
RETURNS = ("mask", "confidence", "entropy", "overlay", "rle", "polygons", "explanation")
DEFAULT_RETURNS = ("mask", "explanation")
# Limits the adapters that one request loads.
MAX_TOP_K = 64
MAX_ADAPTER_NAMES = 256
TEMPERATURE_RANGE = (1e-6, 1e6)
_LIST_PARAMETERS = ("classes", "adapters", "return")
PARAMETERS = (
    *_LIST_PARAMETERS,
    *("library", "top_k", "temperature", "mode", "tiling", "timeout_s", "opacity"),
)
_ADAPTER_PATTERN = re.compile(r"-?[a-z0-9][a-z0-9._-]{0,127}")
_NUMBER_PATTERN = re.compile(r"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})([eE][+-]?\d{1,4})?", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentParameters:
    """The checked parameters of a request, common to all its images.

    Attributes:
        classes: In the order of their ids.
        library: Name of one of the service's libraries.
        query: How adapters are selected.
        returns: A subset of ``RETURNS``.
        tiling: Whether the image is cut into tiles.
        timeout_s: From the arrival of the request.
        opacity: Of the overlay's colours, in [0, 1].
    """

    classes: LabelSpace
    library: str
    query: AdapterQuery
    returns: frozenset[str]
    tiling: TilingMode
    timeout_s: float
    opacity: float

    @property
    def maps(self) -> frozenset[MapName]:
        """The score maps to compute."""
        names: tuple[MapName, ...] = ("confidence", "entropy")
        return frozenset(name for name in names if name in self.returns)


class ParameterParser:
    """Parses parameters with the limits and defaults of a service."""

    def __init__(self, config: ServiceConfig) -> None:
        self._limits: Limits = config.limits
        self._libraries = tuple(config.libraries)
        self._default_settings = config.adaptive_settings()

    def parse(self, fields: Sequence[tuple[str, str]]) -> SegmentParameters:
        """Parse the parameters of a segmentation.

        Args:
            fields: Names and values.

        Raises:
            ServiceError: ``invalid``, naming the parameter, or ``no_such_library``.
        """
        values, lists = _split_lists(fields)
        only, exclude = _parse_adapters(lists["adapters"])
        settings = replace(
            self._default_settings,
            k=_parse_integer(
                "top_k", values.get("top_k"), self._default_settings.k, (1, MAX_TOP_K)
            ),
            temperature=_parse_number(
                "temperature",
                values.get("temperature"),
                self._default_settings.temperature,
                TEMPERATURE_RANGE,
            ),
            mode=cast(AdapterMode, _parse_choice("mode", values.get("mode", "fused"), MODES)),
        )
        max_timeout_s = self._limits.request_timeout_s
        return SegmentParameters(
            classes=self._parse_classes(lists["classes"]),
            library=self.library(values.get("library")),
            query=AdapterQuery(settings=settings, only=only, exclude=exclude),
            returns=_parse_returns(lists["return"]),
            tiling=cast(TilingMode, _parse_choice("tiling", values.get("tiling", "auto"), TILINGS)),
            timeout_s=min(
                _parse_number(
                    "timeout_s", values.get("timeout_s"), max_timeout_s, (0.001, math.inf)
                ),
                max_timeout_s,
            ),
            opacity=_parse_number("opacity", values.get("opacity"), 0.55, (0.0, 1.0)),
        )

    def library(self, name: str | None) -> str:
        """Check a library's name; None returns the first library.

        Raises:
            ServiceError: ``no_such_library``.
        """
        if name is None:
            return self._libraries[0]
        if name not in self._libraries:
            raise no_such_library_error(name, self._libraries)
        return name

    def _parse_classes(self, texts: Sequence[str]) -> LabelSpace:
        names = [name for text in texts for name in _split_class_names(text)]
        max_count, max_chars = self._limits.classes, self._limits.class_name_chars
        if not 1 <= len(names) <= max_count:
            raise _invalid_parameter(
                "classes", f"got {len(names)} names, expected 1 to {max_count}"
            )
        if too_long := [name for name in names if len(name) > max_chars]:
            raise _invalid_parameter(
                "classes",
                f"got a name of {len(too_long[0])} characters, expected at most {max_chars}",
            )
        try:
            space = LabelSpace(tuple(names))
            check_classes(space.names)
        except (DatasetError, ConfigError) as error:
            raise _invalid_parameter("classes", str(error)) from error
        return space


def unique_parameters(
    fields: Sequence[tuple[str, str]], allowed: Collection[str]
) -> dict[str, str]:
    """Return parameters by name.

    Raises:
        ServiceError: ``invalid``: a parameter is unknown or repeated.
    """
    values: dict[str, str] = {}
    for name, text in fields:
        if name not in allowed:
            raise ServiceError(
                "invalid",
                f"unknown parameter {_quote(name)}{_suggestion(name, allowed)} "
                f"(known: {', '.join(allowed) or 'none'})",
            )
        if name in values:
            raise _invalid_parameter(name, "expected only one value")
        values[name] = text
    return values


def _split_lists(
    fields: Sequence[tuple[str, str]],
) -> tuple[dict[str, str], Mapping[str, list[str]]]:
    lists: dict[str, list[str]] = {name: [] for name in _LIST_PARAMETERS}
    single: list[tuple[str, str]] = []
    for name, text in fields:
        if name in lists:
            lists[name].append(text)
        else:
            single.append((name, text))
    return unique_parameters(single, PARAMETERS), lists


def _split_class_names(text: str) -> list[str]:
    """Parse a JSON array of strings, or comma-separated names."""
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        names: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid_parameter("classes", "got an invalid JSON array") from error
    if not all(isinstance(name, str) for name in names):
        raise _invalid_parameter(
            "classes", "expected a JSON array of strings, or comma-separated names"
        )
    return names


def _parse_adapters(texts: Sequence[str]) -> tuple[frozenset[str], frozenset[str]]:
    names = {item.strip() for text in texts for item in text.split(",") if item.strip()}
    if len(names) > MAX_ADAPTER_NAMES:
        raise _invalid_parameter(
            "adapters", f"got {len(names)} names, expected at most {MAX_ADAPTER_NAMES}"
        )
    if invalid := sorted(name for name in names if not _ADAPTER_PATTERN.fullmatch(name)):
        raise _invalid_parameter(
            "adapters",
            f"got {_quote(invalid[0])}, expected names, with a leading hyphen to exclude one",
        )
    only = frozenset(name for name in names if not name.startswith("-"))
    if len(only) > MAX_TOP_K:
        raise _invalid_parameter(
            "adapters", f"got {len(only)} adapters to fuse, expected at most {MAX_TOP_K}"
        )
    return only, frozenset(name[1:] for name in names if name.startswith("-"))


def _parse_returns(texts: Sequence[str]) -> frozenset[str]:
    if not texts:
        return frozenset(DEFAULT_RETURNS)
    items = [item.strip() for text in texts for item in text.split(",")]
    return frozenset(_parse_choice("return", item, RETURNS) for item in items)


def _parse_choice(name: str, text: str, allowed: Sequence[str]) -> str:
    if text not in allowed:
        raise _invalid_parameter(
            name, f"got {_quote(text)}{_suggestion(text, allowed)} (expected: {', '.join(allowed)})"
        )
    return text


def _parse_integer(name: str, text: str | None, default: int, bounds: tuple[int, int]) -> int:
    if text is None:
        return default
    low, high = bounds
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not low <= int(text) <= high:
        raise _invalid_parameter(
            name, f"got {_quote(text)}, expected a whole number from {low} to {high}"
        )
    return int(text)


def _parse_number(
    name: str, text: str | None, default: float, bounds: tuple[float, float]
) -> float:
    if text is None:
        return default
    low, high = bounds
    value = float(text) if _NUMBER_PATTERN.fullmatch(text) else math.nan
    if not low <= value <= high or math.isinf(value):
        raise _invalid_parameter(
            name, f"got {_quote(text)}, expected a number from {low:g} to {high:g}"
        )
    return value


def _invalid_parameter(name: str, reason: str) -> ServiceError:
    return ServiceError("invalid", f"{name}: {reason}")


def _quote(text: str) -> str:
    """Return untrusted text for a message: shortened, in ASCII."""
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def _suggestion(text: str, allowed: Collection[str]) -> str:
    close = difflib.get_close_matches(text[:60], allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
