"""What a client may ask for, read from the query or the form, each value checked."""

import difflib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, DatasetError, ServiceError
from loraseg.segment.base import check_classes
from loraseg.segment.choice import Mode, TilingChoice, Wish
from loraseg.serving.config import Limits, ServiceConfig
from loraseg.serving.orders import MapName
from loraseg.serving.views import default_settings

__all__ = ["MODES", "PARAMETERS", "RETURNS", "TILINGS", "TOP_K", "Ask", "Asking", "one_of_each"]

MODES = ("fused", "base", "uniform")
TILINGS = get_args(TilingChoice)
RETURNS = ("mask", "confidence", "entropy", "overlay", "rle", "polygons", "explanation")
DEFAULT_RETURNS = ("mask", "explanation")
# More neighbours would make one request load a library.
TOP_K = 64
ADAPTER_NAMES = 256
TEMPERATURES = (1e-6, 1e6)
_LISTS = ("classes", "adapters", "return")
PARAMETERS = (
    *_LISTS,
    *("library", "top_k", "temperature", "mode", "tiling", "timeout_s", "opacity"),
)
_ADAPTER = re.compile(r"-?[a-z0-9][a-z0-9._-]{0,127}")
_NUMBER = re.compile(r"[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})([eE][+-]?\d{1,4})?", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What one request asks for, whatever the image.

    Attributes:
        classes: In the order of their ids.
        library: One that is served.
        wish: How adapters are chosen.
        returns: Some of ``RETURNS``.
        tiling: Whether the image is cut into tiles.
        timeout_s: From the request's arrival to the answer.
        opacity: Of the overlay's colours, in [0, 1].
    """

    classes: LabelSpace
    library: str
    wish: Wish
    returns: frozenset[str]
    tiling: TilingChoice
    timeout_s: float
    opacity: float

    @property
    def maps(self) -> frozenset[MapName]:
        """The further maps that are computed for it."""
        wanted: tuple[MapName, ...] = ("confidence", "entropy")
        return frozenset(name for name in wanted if name in self.returns)


class Asking:
    """Reads parameters as one service takes them."""

    def __init__(self, config: ServiceConfig) -> None:
        self._limits: Limits = config.limits
        self._libraries = tuple(config.libraries)
        self._settings = default_settings(config)

    def read(self, fields: Sequence[tuple[str, str]]) -> Ask:
        """Check all parameters of a segmentation.

        Raises:
            ServiceError: ``invalid`` with the name of the parameter, or ``no_such_library``.
        """
        values, lists = _sorted_out(fields)
        only, exclude = _adapters(lists["adapters"])
        settings = replace(
            self._settings,
            k=_integer("top_k", values.get("top_k"), self._settings.k, (1, TOP_K)),
            temperature=_number(
                "temperature", values.get("temperature"), self._settings.temperature, TEMPERATURES
            ),
            mode=cast(Mode, _one_of("mode", values.get("mode", "fused"), MODES)),
        )
        most_s = self._limits.request_timeout_s
        return Ask(
            classes=self._classes(lists["classes"]),
            library=self.library(values.get("library")),
            wish=Wish(settings=settings, only=only, exclude=exclude),
            returns=_returns(lists["return"]),
            tiling=cast(TilingChoice, _one_of("tiling", values.get("tiling", "auto"), TILINGS)),
            timeout_s=min(
                _number("timeout_s", values.get("timeout_s"), most_s, (0.001, math.inf)), most_s
            ),
            opacity=_number("opacity", values.get("opacity"), 0.55, (0.0, 1.0)),
        )

    def library(self, name: str | None) -> str:
        """Return a library's name; the first one's for None.

        Raises:
            ServiceError: ``no_such_library``.
        """
        if name is None:
            return self._libraries[0]
        if name not in self._libraries:
            raise ServiceError(
                "no_such_library", f"library {_shown(name)}{_hint(name, self._libraries)}"
            )
        return name

    def _classes(self, texts: Sequence[str]) -> LabelSpace:
        names = [name for text in texts for name in _class_names(text)]
        most, longest = self._limits.classes, self._limits.class_name_chars
        if not 1 <= len(names) <= most:
            raise _invalid("classes", f"got {len(names)} names, expected 1 to {most}")
        if too_long := [name for name in names if len(name) > longest]:
            raise _invalid(
                "classes", f"a name of {len(too_long[0])} characters; at most {longest} are taken"
            )
        try:
            space = LabelSpace(tuple(names))
            check_classes(space.names)
        except (DatasetError, ConfigError) as error:
            raise _invalid("classes", str(error)) from error
        return space


def one_of_each(fields: Sequence[tuple[str, str]], known: Collection[str]) -> dict[str, str]:
    """Return parameters by name.

    Raises:
        ServiceError: ``invalid``: one is unknown or given twice.
    """
    values: dict[str, str] = {}
    for name, text in fields:
        if name not in known:
            raise ServiceError(
                "invalid",
                f"There is no parameter {_shown(name)}{_hint(name, known)} "
                f"(known: {', '.join(known) or 'none'})",
            )
        if name in values:
            raise _invalid(name, "given twice")
        values[name] = text
    return values


def _sorted_out(
    fields: Sequence[tuple[str, str]],
) -> tuple[dict[str, str], Mapping[str, list[str]]]:
    lists: dict[str, list[str]] = {name: [] for name in _LISTS}
    single: list[tuple[str, str]] = []
    for name, text in fields:
        if name in lists:
            lists[name].append(text)
        else:
            single.append((name, text))
    return one_of_each(single, PARAMETERS), lists


def _class_names(text: str) -> list[str]:
    """Read a JSON array of strings, or names between commas."""
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        names: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid("classes", "starts like a JSON array, but is none") from error
    if not all(isinstance(name, str) for name in names):
        raise _invalid("classes", "expected a JSON array of strings, or names between commas")
    return names


def _adapters(texts: Sequence[str]) -> tuple[frozenset[str], frozenset[str]]:
    names = {item.strip() for text in texts for item in text.split(",") if item.strip()}
    if len(names) > ADAPTER_NAMES:
        raise _invalid("adapters", f"got {len(names)} names, at most {ADAPTER_NAMES} are taken")
    if wrong := sorted(name for name in names if not _ADAPTER.fullmatch(name)):
        raise _invalid(
            "adapters",
            f"{_shown(wrong[0])}: expected names, each alone to use it or as -name to exclude it",
        )
    only = frozenset(name for name in names if not name.startswith("-"))
    if len(only) > TOP_K:
        raise _invalid("adapters", f"got {len(only)} to use, at most {TOP_K} are fused")
    return only, frozenset(name[1:] for name in names if name.startswith("-"))


def _returns(texts: Sequence[str]) -> frozenset[str]:
    if not texts:
        return frozenset(DEFAULT_RETURNS)
    items = [item.strip() for text in texts for item in text.split(",")]
    return frozenset(_one_of("return", item, RETURNS) for item in items)


def _one_of(name: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        raise _invalid(
            name, f"got {_shown(text)}{_hint(text, known)} (expected: {', '.join(known)})"
        )
    return text


def _integer(name: str, text: str | None, default: int, bounds: tuple[int, int]) -> int:
    if text is None:
        return default
    low, high = bounds
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not low <= int(text) <= high:
        raise _invalid(name, f"got {_shown(text)}, expected a whole number from {low} to {high}")
    return int(text)


def _number(name: str, text: str | None, default: float, bounds: tuple[float, float]) -> float:
    if text is None:
        return default
    low, high = bounds
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not low <= value <= high or math.isinf(value):
        raise _invalid(name, f"got {_shown(text)}, expected a number from {low:g} to {high:g}")
    return value


def _invalid(name: str, reason: str) -> ServiceError:
    return ServiceError("invalid", f"{name}: {reason}")


def _shown(text: str) -> str:
    """Return a client's text as it may stand in a message: short, and in plain characters."""
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def _hint(text: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(text[:60], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
