"""What a synthetic dataset was begun with: every later run must want the same."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from loraseg import config as configuration
from loraseg.bulk.pinned import begin_or_join, refuse_changes, warn_of_other_code
from loraseg.data.labels import LabelSpace
from loraseg.errors import MALFORMED, IntegrityError
from loraseg.factory.config import SynthesisConfig
from loraseg.revision import code_revision
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store

__all__ = ["DATASET", "AdapterFact", "Facts", "Pinned", "begin", "read_pinned"]

DATASET = "dataset.json"
_FORMAT = 1
_MOST_THREADS = 1024
# What may change from run to run: which masks, how many images of each, how they are cut.
_FREE = ("masks", "output", "split", "classes", "limit", "masks_per_shard", "append")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFact:
    """An adapter as it was found.

    Attributes:
        spec: Where it is, with the version if it is in a library.
        name: As in its card.
        digest: sha256 of its files.
    """

    spec: str
    name: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the named models turn out to be.

    Attributes:
        base: sha256 of the text-to-image model.
        adapters: In their order.
        generator: Digest of all that decides what a mask and a seed become.
        segmenter: sha256 of the segmenter's file.
        class_loss: The segmenter's mean loss on real images of each class (FreeMask); None for a
            class that they do not show.
    """

    base: str
    adapters: tuple[AdapterFact, ...]
    generator: str
    segmenter: str | None = None
    class_loss: tuple[float | None, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pinned:
    """What all runs into one output have in common.

    Attributes:
        config: Resolved.
        classes: Class names by id.
        threads: Torch threads; sums split over another number differ in their last bits.
        device: ``cpu`` or ``gpu``, for the same reason.
        facts: What the config's names stood for at the first run.
        code: Revision of the code that began.
    """

    config: SynthesisConfig
    classes: tuple[str, ...]
    threads: int
    device: str
    facts: Facts
    code: str

    @property
    def label_space(self) -> LabelSpace:
        """The classes."""
        return LabelSpace(self.classes)

    def to_bytes(self) -> bytes:
        """Return ``dataset.json``, without what may change from run to run."""
        content = {
            "format": _FORMAT,
            "classes": list(self.classes),
            "settings": _settings(self.config),
            "threads": self.threads,
            "device": self.device,
            "facts": asdict(self.facts),
            "code": self.code,
        }
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


Look = Callable[[SynthesisConfig, LabelSpace], Facts]


def begin(
    config: SynthesisConfig, label_space: LabelSpace, threads: int, device: str, look: Look
) -> Pinned:
    """Return what the output was begun with, or begin it.

    Args:
        config: Resolved.
        label_space: Of the masks.
        threads: As in :class:`Pinned`.
        device: As in :class:`Pinned`.
        look: Loads what a config names, to see what it is; only called to begin.

    Raises:
        ConfigError: The output was begun with other settings.
        IntegrityError: Its state is damaged.
        LorasegError: As raised by library, store and models.
    """
    output = open_store(config.output)

    def start() -> Pinned:
        return Pinned(
            config=config,
            classes=label_space.names,
            threads=threads,
            device=device,
            facts=look(config, label_space),
            code=code_revision(),
        )

    known, begun = begin_or_join(
        output, DATASET, lambda: read_pinned(output, config), start, Pinned.to_bytes
    )
    if not begun:
        _compare(known, config, label_space, threads, device)
        warn_of_other_code(config.output, known.code)
    return known


def read_pinned(output: ObjectStore, config: SynthesisConfig | None = None) -> Pinned | None:
    """Read ``dataset.json``; None if there is none.

    Args:
        output: The synthetic dataset.
        config: For what ``dataset.json`` leaves open; None to leave it at nothing.

    Raises:
        IntegrityError: It is damaged.
    """
    try:
        data = output.get(DATASET)
    except ObjectNotFoundError:
        return None
    try:
        values = json.loads(data)
        if values["format"] != _FORMAT:
            raise IntegrityError(
                f"{output.uri}/{DATASET}: format {values['format']!r}, expected {_FORMAT}"
            )
        free: dict[str, Any] = {"masks": output.uri, "output": output.uri}
        if config is not None:
            free = {key: configuration.to_dict(config)[key] for key in _FREE}
            if config.segmenter and values["settings"]["segmenter"]:
                # It may lie elsewhere by now: its digest is compared when it is loaded.
                free["segmenter"] = config.segmenter
        built = configuration.build(SynthesisConfig, {**values["settings"], **free})
        if config is not None:
            more = replace(built.sampling, images=config.sampling.images)
            built = replace(built, sampling=more)
        facts = configuration.build(Facts, values["facts"])
        names = LabelSpace(tuple(values["classes"])).names
        threads = int(values["threads"])
        if not 1 <= threads <= _MOST_THREADS:
            raise ValueError(f"threads {threads}, expected 1 to {_MOST_THREADS}")
        return Pinned(
            config=built,
            classes=names,
            threads=threads,
            device=str(values["device"]),
            facts=facts,
            code=str(values["code"]),
        )
    except MALFORMED as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{output.uri}/{DATASET}: damaged: {error}") from error


def _settings(config: SynthesisConfig) -> dict[str, Any]:
    values = configuration.to_dict(config)
    for name in _FREE:
        del values[name]
    return values


def _compare(
    known: Pinned, config: SynthesisConfig, label_space: LabelSpace, threads: int, device: str
) -> None:
    then = _flat(_settings(known.config))
    then |= {"classes": list(known.classes), "threads": known.threads, "device": known.device}
    now = _flat(_settings(config))
    now |= {"classes": list(label_space.names), "threads": threads, "device": device}
    del then["sampling.images"], now["sampling.images"]
    refuse_changes(config.output, then, now)


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{before}{key}.")
        else:
            out[f"{before}{key}"] = value
    return out
