"""The run state: what an output was created with, which every later run into it must match."""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar, cast

from loraseg import config as configuration
from loraseg.data.labels import LabelSpace
from loraseg.errors import MALFORMED_INPUT_ERRORS, ConfigError, IntegrityError
from loraseg.revision import code_revision
from loraseg.storage import ObjectNotFoundError, ObjectStore
from loraseg.storage.json_io import parse_json_object, readable_json

__all__ = [
    "RunState",
    "RunStateFormat",
    "check_same_settings",
    "create_once",
    "open_or_create",
    "warn_code_changed",
]

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")
ModelsT = TypeVar("ModelsT")
ValueT = TypeVar("ValueT")
JsonObject = dict[str, Any]

_FORMAT = 1
_MAX_THREADS = 1024
_MAX_STATE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState(Generic[ConfigT, ModelsT]):
    """What all runs into one output have in common.

    Attributes:
        config: Resolved config.
        classes: Class names by id.
        threads: Torch threads of a worker; another number changes the last bits of sums.
        device: ``cpu`` or ``gpu``, for the same reason.
        models: What the model names of the config resolved to in the first run.
        code: Code revision of the first run.
    """

    config: ConfigT
    classes: tuple[str, ...]
    threads: int
    device: str
    models: ModelsT
    code: str

    @property
    def label_space(self) -> LabelSpace:
        """The classes with their colours."""
        return LabelSpace(self.classes)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStateFormat(Generic[ConfigT, ModelsT]):
    """How a job stores its run state as a JSON object.

    Attributes:
        key: Key of the object in the output.
        config: Class of the config.
        models: Class of the resolved models.
        settings_key: JSON key of the settings.
        has_classes: Whether the class names are stored beside the settings, not among them.
        unstored: Config fields that are not stored, since later runs may change them.
    """

    key: str
    config: type[ConfigT]
    models: type[ModelsT]
    settings_key: str
    has_classes: bool
    unstored: tuple[str, ...]

    def to_json(self, state: RunState[ConfigT, ModelsT]) -> JsonObject:
        """Return plain JSON values."""
        return {
            "format": _FORMAT,
            self.settings_key: self.settings(state.config),
            **({"classes": list(state.classes)} if self.has_classes else {}),
            "threads": state.threads,
            "device": state.device,
            "facts": asdict(cast(Any, state.models)),
            "code": state.code,
        }

    def encode(self, state: RunState[ConfigT, ModelsT]) -> bytes:
        """Return the object's bytes."""
        return readable_json(self.to_json(state))

    def settings(self, config: ConfigT) -> JsonObject:
        """Return the stored part of a config as plain JSON values."""
        values = configuration.to_dict(config)
        return {name: value for name, value in values.items() if name not in self.unstored}

    def read(
        self, output: ObjectStore, complete: Callable[[JsonObject], JsonObject]
    ) -> RunState[ConfigT, ModelsT] | None:
        """Read the run state of an output; None if there is none.

        Args:
            output: Store of the output.
            complete: Adds the config fields that are not stored to the stored settings.

        Raises:
            IntegrityError: The object is damaged or of another format.
            StoreError: The store cannot be read.
        """
        try:
            data = output.get(self.key)
        except ObjectNotFoundError:
            return None
        where = f"{output.uri}/{self.key}"
        try:
            values = parse_json_object(
                data, where, max_bytes=_MAX_STATE_BYTES, error=IntegrityError
            )
            if values["format"] != _FORMAT:
                raise IntegrityError(f"{where}: format {values['format']!r}, expected {_FORMAT}")
            settings = values[self.settings_key]
            classes = values["classes"] if self.has_classes else settings["classes"]
            threads = int(values["threads"])
            if not 1 <= threads <= _MAX_THREADS:
                raise ValueError(f"threads {threads}, expected 1 to {_MAX_THREADS}")
            return RunState(
                config=configuration.build(self.config, complete(settings)),
                classes=LabelSpace(tuple(classes)).names,
                threads=threads,
                device=str(values["device"]),
                models=configuration.build(self.models, values["facts"]),
                code=str(values["code"]),
            )
        except MALFORMED_INPUT_ERRORS as error:
            if isinstance(error, IntegrityError):
                raise
            raise IntegrityError(f"{where}: damaged: {error}") from error

    def check_same_run(
        self,
        output: str,
        recorded: RunState[ConfigT, ModelsT],
        requested: RunState[ConfigT, Any],
        mutable: Collection[str] = (),
    ) -> None:
        """Check that a run has the settings, classes, threads and device of an output.

        Args:
            output: URI, for the error message.
            recorded: Run state of the output.
            requested: Run state that the run would create; its models are not compared.
            mutable: Settings that may differ, with dots for inner ones.

        Raises:
            ConfigError: Some differ.
        """
        then, now = self._comparable(recorded), self._comparable(requested)
        for name in mutable:
            del then[name], now[name]
        check_same_settings(output, then, now)

    def _comparable(self, state: RunState[ConfigT, Any]) -> JsonObject:
        return {
            **_flatten(self.settings(state.config)),
            "classes": list(state.classes),
            "threads": state.threads,
            "device": state.device,
        }


def open_or_create(
    state_format: RunStateFormat[ConfigT, ModelsT],
    output: ObjectStore,
    requested: RunState[ConfigT, None],
    resolve: Callable[[], tuple[ConfigT, ModelsT]],
    complete: Callable[[JsonObject], JsonObject],
    mutable: Collection[str] = (),
) -> RunState[ConfigT, ModelsT]:
    """Return the run state of an output; create it in the first run.

    Args:
        state_format: How the job stores it.
        output: Store of the output.
        requested: What this run has been given.
        resolve: Loads the models of the config and returns the config to record with what they
            resolved to. Called in the first run only.
        complete: As for :meth:`RunStateFormat.read`.
        mutable: As for :meth:`RunStateFormat.check_same_run`.

    Raises:
        ConfigError: The output was created with other settings.
        IntegrityError: Its run state is damaged.
        LorasegError: As raised by library, store and models.
    """

    def create() -> RunState[ConfigT, ModelsT]:
        config, models = resolve()
        return RunState(
            config=config,
            classes=requested.classes,
            threads=requested.threads,
            device=requested.device,
            models=models,
            code=requested.code,
        )

    state, created = create_once(
        output,
        state_format.key,
        lambda: state_format.read(output, complete),
        create,
        state_format.encode,
    )
    if not created:
        state_format.check_same_run(output.uri, state, requested, mutable)
        warn_code_changed(output.uri, state.code)
    return state


def create_once(
    output: ObjectStore,
    key: str,
    read: Callable[[], ValueT | None],
    create: Callable[[], ValueT],
    encode: Callable[[ValueT], bytes],
) -> tuple[ValueT, bool]:
    """Return the value stored under a key, and whether this call created it.

    Of several runs that start at the same time one creates the value; the others read it.

    Args:
        output: Store of the output.
        key: Key of the object.
        read: Reads the value; None if there is none.
        create: Computes the value.
        encode: Converts the value to the object's bytes.

    Raises:
        IntegrityError: The object was deleted while this run started.
        LorasegError: As raised by the functions.
    """
    known = read()
    if known is not None:
        return known, False
    fresh = create()
    if output.put_if_absent(key, encode(fresh)):
        return fresh, True
    known = read()  # another run was first
    if known is None:
        raise IntegrityError(f"{output.uri}: {key} was deleted while this run started")
    return known, False


def check_same_settings(
    output: str, recorded: Mapping[str, Any], requested: Mapping[str, Any]
) -> None:
    """Check that a run has the settings that an output was created with.

    Raises:
        ConfigError: Some differ; the message names each with both values.
    """
    changes = [
        f"{name} was {json.dumps(recorded.get(name))} and is {json.dumps(requested[name])}"
        for name in requested
        if recorded.get(name) != requested[name]
    ]
    if changes:
        raise ConfigError(
            f"{output} was created with other settings: {'; '.join(changes)}. "
            "Use the old settings, or choose another output"
        )


def warn_code_changed(output: str, code: str) -> None:
    """Log a warning if an output was created by another code revision: its results may differ."""
    if code != code_revision():
        logger.warning("%s was created by another code revision (%s)", output, code)


def _flatten(values: JsonObject, prefix: str = "") -> JsonObject:
    flat: JsonObject = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(cast(JsonObject, value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
