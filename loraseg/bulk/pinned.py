"""What an output was begun with: every later run must want the same."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from loraseg import config as configuration
from loraseg.bulk.config import BulkConfig
from loraseg.errors import ConfigError, IntegrityError
from loraseg.library.catalog import Library
from loraseg.revision import code_revision
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store

__all__ = ["STATE", "Facts", "Pinned", "begin"]

logger = logging.getLogger(__name__)

STATE = "state.json"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
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
class Pinned:
    """What all runs into one output have in common.

    Attributes:
        config: Resolved, with the library's generation.
        threads: Torch threads; sums split over another number differ in their last bits.
        device: ``cpu`` or ``gpu``, for the same reason.
        facts: What the config's names stood for at the first run.
        code: Revision of the code that began.
    """

    config: BulkConfig
    threads: int
    device: str
    facts: Facts
    code: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without where the output lies: it may be moved."""
        config = configuration.to_dict(self.config)
        del config["output"]
        rest = {"threads": self.threads, "device": self.device, "code": self.code}
        return {"format": _FORMAT, "config": config, **rest, "facts": asdict(self.facts)}


def begin(
    config: BulkConfig, threads: int, device: str, look: Callable[[BulkConfig], Facts]
) -> Pinned:
    """Return what the output was begun with, or begin it.

    Args:
        config: Resolved.
        threads: As in :class:`Pinned`.
        device: As in :class:`Pinned`.
        look: Loads what a config names, to see what it is; only called to begin.

    Raises:
        ConfigError: The output was begun with other settings.
        IntegrityError: Its state is damaged.
        LorasegError: As raised by library, store and models.
    """
    output = open_store(config.output)
    known = _read(output, config)
    if known is None:
        if config.generation is None and config.library is not None:
            generation = Library(open_store(config.library)).generation()
            config = replace(config, generation=generation)
        fresh = Pinned(
            config=config,
            threads=threads,
            device=device,
            facts=look(config),
            code=code_revision(),
        )
        text = json.dumps(fresh.to_json(), indent=1, sort_keys=True) + "\n"
        if output.put_if_absent(STATE, text.encode()):
            return fresh
        known = _read(output, config)  # another run was first
    if known is None:
        raise IntegrityError(f"{output.uri}: {STATE} has vanished while a run began")
    _compare(known, config, threads, device)
    if known.code != code_revision():
        logger.warning("%s was begun by other code (%s)", config.output, known.code)
    return known


def _read(output: ObjectStore, config: BulkConfig) -> Pinned | None:
    try:
        data = output.get(STATE)
    except ObjectNotFoundError:
        return None
    try:
        values = json.loads(data)
        if values["format"] != _FORMAT:
            raise IntegrityError(f"{output.uri}/{STATE}: format {values['format']!r}, expected 1")
        return Pinned(
            config=configuration.build(BulkConfig, {**values["config"], "output": config.output}),
            threads=values["threads"],
            device=values["device"],
            facts=Facts(**values["facts"]),
            code=values["code"],
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{output.uri}/{STATE}: damaged: {error}") from error


def _compare(known: Pinned, config: BulkConfig, threads: int, device: str) -> None:
    then = {**configuration.to_dict(known.config), "threads": known.threads}
    now = {**configuration.to_dict(config), "threads": threads, "device": device}
    then["device"] = known.device
    if config.generation is None:
        now["generation"] = then["generation"]
    changes = [
        f"{name} was {json.dumps(then[name])} and is {json.dumps(now[name])}"
        for name in now
        if then.get(name) != now[name]
    ]
    if changes:
        raise ConfigError(
            f"{config.output} was begun with other settings: {'; '.join(changes)}. "
            "Go on with the old ones, or choose another output"
        )
