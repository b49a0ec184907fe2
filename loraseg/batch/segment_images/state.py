"""What an output was begun with: every later run must want the same."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from loraseg import config as configuration
from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.errors import ConfigError, IntegrityError
from loraseg.library.catalog import Library
from loraseg.revision import code_revision
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store

__all__ = [
    "STATE_KEY",
    "ResolvedSegmentationModels",
    "SegmentationRunState",
    "check_same_settings",
    "create_once",
    "open_or_create",
    "warn_code_changed",
]

logger = logging.getLogger(__name__)

STATE_KEY = "state.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedSegmentationModels:
    """What the named models turn out to be.

    Attributes:
        base: sha256 of the base model.
        encoder: Which encoder's centroids are searched.
        clip_attention_lora: Whether adapters of the CLIP attention act.
        vacancy: Why no adapter fits, None if some do.
    """

    base: str
    encoder: str
    clip_attention_lora: str
    vacancy: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationRunState:
    """What all runs into one output have in common.

    Attributes:
        config: Resolved, with the library's generation.
        threads: Torch threads; sums split over another number differ in their last bits.
        device: ``cpu`` or ``gpu``, for the same reason.
        models: What the config's names stood for at the first run.
        code: Revision of the code that began.
    """

    config: SegmentImagesConfig
    threads: int
    device: str
    models: ResolvedSegmentationModels
    code: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without where the output lies: it may be moved."""
        config = configuration.to_dict(self.config)
        del config["output"]
        rest = {"threads": self.threads, "device": self.device, "code": self.code}
        return {"format": _FORMAT, "config": config, **rest, "facts": asdict(self.models)}


def open_or_create(
    config: SegmentImagesConfig,
    threads: int,
    device: str,
    resolve_models: Callable[[SegmentImagesConfig], ResolvedSegmentationModels],
) -> SegmentationRunState:
    """Return what the output was begun with, or begin it.

    Args:
        config: Resolved.
        threads: As in :class:`Pinned`.
        device: As in :class:`Pinned`.
        resolve_models: Loads what a config names, to see what it is; only called to begin.

    Raises:
        ConfigError: The output was begun with other settings.
        IntegrityError: Its state is damaged.
        LorasegError: As raised by library, store and models.
    """
    output = open_store(config.output)

    def start() -> SegmentationRunState:
        first = config
        if config.generation is None and config.library is not None:
            generation = Library(open_store(config.library)).generation()
            first = replace(config, generation=generation)
        return SegmentationRunState(
            config=first,
            threads=threads,
            device=device,
            models=resolve_models(first),
            code=code_revision(),
        )

    def encode(fresh: SegmentationRunState) -> bytes:
        return (json.dumps(fresh.to_json(), indent=1, sort_keys=True) + "\n").encode()

    known, begun = create_once(output, STATE_KEY, lambda: _read(output, config), start, encode)
    if not begun:
        _check_same_run(known, config, threads, device)
        warn_code_changed(config.output, known.code)
    return known


T = TypeVar("T")


def create_once(
    output: ObjectStore,
    key: str,
    read: Callable[[], T | None],
    create: Callable[[], T],
    encode: Callable[[T], bytes],
) -> tuple[T, bool]:
    """Return what an output was begun with, and whether this call began it.

    Of any number of runs that begin at once one does, and the others join it.

    Args:
        output: Of the job.
        key: Where it says what it was begun with.
        read: Reads that; None if nothing is there.
        create: Finds out what to begin with.
        encode: Makes the bytes to keep.

    Raises:
        IntegrityError: What was there has vanished.
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
        raise IntegrityError(f"{output.uri}: {key} has vanished while a run began")
    return known, False


def check_same_settings(
    output: str, recorded: Mapping[str, Any], requested: Mapping[str, Any]
) -> None:
    """Refuse settings that differ from those that an output was begun with.

    Raises:
        ConfigError: Some do; it names them.
    """
    changes = [
        f"{name} was {json.dumps(recorded.get(name))} and is {json.dumps(requested[name])}"
        for name in requested
        if recorded.get(name) != requested[name]
    ]
    if changes:
        raise ConfigError(
            f"{output} was begun with other settings: {'; '.join(changes)}. "
            "Go on with the old ones, or choose another output"
        )


def warn_code_changed(output: str, code: str) -> None:
    """Say so if an output was begun by other code: its results may differ."""
    if code != code_revision():
        logger.warning("%s was begun by other code (%s)", output, code)


def _read(output: ObjectStore, config: SegmentImagesConfig) -> SegmentationRunState | None:
    try:
        data = output.get(STATE_KEY)
    except ObjectNotFoundError:
        return None
    try:
        values = json.loads(data)
        if values["format"] != _FORMAT:
            raise IntegrityError(
                f"{output.uri}/{STATE_KEY}: format {values['format']!r}, expected 1"
            )
        return SegmentationRunState(
            config=configuration.build(
                SegmentImagesConfig, {**values["config"], "output": config.output}
            ),
            threads=values["threads"],
            device=values["device"],
            models=ResolvedSegmentationModels(**values["facts"]),
            code=values["code"],
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{output.uri}/{STATE_KEY}: damaged: {error}") from error


def _check_same_run(
    recorded: SegmentationRunState, config: SegmentImagesConfig, threads: int, device: str
) -> None:
    then = {**configuration.to_dict(recorded.config), "threads": recorded.threads}
    now = {**configuration.to_dict(config), "threads": threads, "device": device}
    then["device"] = recorded.device
    if config.generation is None:
        now["generation"] = then["generation"]
    check_same_settings(config.output, then, now)
