"""Configuration from a YAML file and ``key=value`` overrides, as frozen dataclasses.

pydantic parses and validates the values. This module adds overrides, inlined configs and error
messages that name the closest known key.
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import logging
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from loraseg.errors import ConfigError, LorasegError

__all__ = ["INLINED", "OMITTED_AT_DEFAULT", "build", "digest", "load", "main", "to_dict"]

ConfigT = TypeVar("ConfigT")

# Metadata of a dataclass field whose own fields become keys of the top-level config. A job uses it
# to combine the config of the function that it calls with its own settings, in a flat list of keys.
INLINED: Mapping[str, Any] = {"inlined": True}
# Metadata of a field that :func:`to_dict` leaves out at its default. A field that is added to a
# config with published digests has it, so that configs without the field keep their digest.
OMITTED_AT_DEFAULT: Mapping[str, Any] = {"omitted_at_default": True}


def build(cls: type[ConfigT], values: Mapping[str, Any], *, where: str = "config") -> ConfigT:
    """Build a config dataclass from plain values, nested dataclasses included.

    Args:
        cls: A dataclass.
        values: Plain values, as parsed from YAML.
        where: Source of the values, for error messages.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type or range.
    """
    _reject_unknown_keys(cls, values, where, "")
    try:
        return TypeAdapter(cls).validate_python(_nest_inlined(cls, values))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_error(error, _inlined_fields(cls))}") from error


def load(cls: type[ConfigT], path: str | Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply ``key=value`` overrides and build the config.

    Args:
        cls: A dataclass.
        path: A YAML file with a mapping at the top; None for no file.
        overrides: ``key=value`` or ``outer.inner=value``; values are read as YAML.

    Raises:
        ConfigError: The file is not a YAML mapping, or :func:`build` fails.
    """
    values: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {item!r}: expected key=value")
        _set_nested(values, key.split("."), _parse_value(item, text))
    return build(cls, values, where=str(path) if path else "config")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as plain JSON values, from which :func:`build` restores it."""
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    for name in _inlined_fields(type(config)):
        values |= values.pop(name)
    for field in dataclasses.fields(config):
        if "omitted_at_default" in field.metadata and getattr(config, field.name) == field.default:
            del values[field.name]
    return values


def digest(config: Any) -> str:
    """Return the sha256 of the config's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def main(
    run: Callable[[ConfigT], int | None],
    cls: type[ConfigT],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
) -> typing.NoReturn:
    """Run a job from the command line and exit: 0 success, 1 failed work, 2 invalid configuration.

    ``--config FILE`` and ``key=value`` set fields. Each boolean field is also an option, for
    example ``--dry-run`` for ``dry_run``.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    for name in ("loraseg", "actors", "jobs", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    switches = [field.name for field, hint in _keys(cls).values() if hint is bool]
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_field_help(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the fields below")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set one field")
    for name in switches:
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, action="store_true", help=f"{name}=true"
        )
    arguments = parser.parse_intermixed_args(argv)
    overrides = [*arguments.overrides, *(f"{s}=true" for s in switches if getattr(arguments, s))]
    try:
        status = run(load(cls, arguments.config, overrides))
    except ConfigError as error:
        sys.exit(_print_error(error, 2))
    except LorasegError as error:
        sys.exit(_print_error(error, 1))
    sys.exit(status or 0)


def _print_error(error: LorasegError, status: int) -> int:
    sys.stderr.write(f"error: {error}\n")
    return status


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(values).__name__}")
    return typing.cast(dict[str, Any], values)


def _parse_value(item: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is not YAML: {error}") from error


def _set_nested(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {'.'.join(path)}: {key!r} is not a mapping")
        values = typing.cast(dict[str, Any], inner)
    values[path[-1]] = value


def _reject_unknown_keys(cls: Any, values: Any, where: str, prefix: str) -> None:
    """Check nested dataclasses, also inside Optional, tuple, list and dict, for unknown keys."""
    for inner in _dataclasses_in(cls):
        if not isinstance(values, Mapping):
            continue
        known = _keys(inner)
        for key, value in values.items():
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {prefix + close[0]!r}?" if close else ""
                raise ConfigError(
                    f"{where}: unknown key {prefix + str(key)!r}{hint} (known: {', '.join(known)})"
                )
            _reject_unknown_keys(known[key][1], value, where, f"{prefix}{key}.")
        return
    arguments = typing.get_args(cls)
    if not arguments:
        return
    if isinstance(values, Mapping):
        for key, value in values.items():
            _reject_unknown_keys(arguments[-1], value, where, f"{prefix}{key}.")
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            _reject_unknown_keys(arguments[0], value, where, f"{prefix}{index}.")


def _keys(cls: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Return field and type of each key; an inlined field is replaced by its own keys."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for field in dataclasses.fields(cls):
        if field.metadata.get("inlined"):
            keys |= _keys(hints[field.name])
        else:
            keys[field.name] = field, hints[field.name]
    return keys


def _inlined_fields(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get("inlined")]


def _nest_inlined(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Move the keys of inlined fields into a mapping of their own."""
    nested = dict(values)
    hints = typing.get_type_hints(cls)
    for name in _inlined_fields(cls):
        keys = _keys(hints[name])
        nested[name] = {key: nested.pop(key) for key in keys if key in nested}
    return nested


def _dataclasses_in(cls: Any) -> list[Any]:
    """Return the dataclass, or the dataclasses of a union."""
    options = (
        typing.get_args(cls)
        if typing.get_origin(cls) in (typing.Union, types.UnionType)
        else (cls,)
    )
    return [option for option in options if dataclasses.is_dataclass(option)]


def _first_error(error: ValidationError, inlined_fields: Sequence[str]) -> str:
    problem = error.errors(include_url=False)[0]
    location = problem["loc"]
    if location and location[0] in inlined_fields:
        location = location[1:]
    key = ".".join(str(part) for part in location)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    if not key:
        return message
    return f"{key}: {message} (got {problem['input']!r})"


def _field_help(cls: Any) -> str:
    lines = ["fields:"]
    for field, kind in _keys(cls).values():
        kind_name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        if field.default is not dataclasses.MISSING:
            default = f" = {field.default!r}"
        elif field.default_factory is not dataclasses.MISSING:
            default = " = (see source)"
        else:
            default = " (required)"
        lines.append(f"  {field.name}: {kind_name}{default}")
    return "\n".join(lines)
