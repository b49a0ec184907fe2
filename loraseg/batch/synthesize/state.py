"""What a synthetic dataset was begun with: every later run must want the same."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from loraseg import config as configuration
from loraseg.batch.segment_images.state import check_same_settings, create_once, warn_code_changed
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.data.labels import LabelSpace
from loraseg.errors import MALFORMED_INPUT_ERRORS, IntegrityError
from loraseg.revision import code_revision
from loraseg.storage import ObjectNotFoundError, ObjectStore, open_store

__all__ = [
    "DATASET_KEY",
    "ResolvedAdapter",
    "ResolvedSynthesisModels",
    "SynthesisRunState",
    "open_or_create",
    "read_run_state",
]

DATASET_KEY = "dataset.json"
_FORMAT = 1
_MAX_THREADS = 1024
# What may change from run to run: which masks, how many images of each, how they are cut.
_MUTABLE_FIELDS = ("masks", "output", "split", "classes", "limit", "masks_per_shard", "append")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedAdapter:
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
class ResolvedSynthesisModels:
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
    adapters: tuple[ResolvedAdapter, ...]
    generator: str
    segmenter: str | None = None
    class_loss: tuple[float | None, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisRunState:
    """What all runs into one output have in common.

    Attributes:
        config: Resolved.
        classes: Class names by id.
        threads: Torch threads; sums split over another number differ in their last bits.
        device: ``cpu`` or ``gpu``, for the same reason.
        models: What the config's names stood for at the first run.
        code: Revision of the code that began.
    """

    config: SynthesisConfig
    classes: tuple[str, ...]
    threads: int
    device: str
    models: ResolvedSynthesisModels
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
            "facts": asdict(self.models),
            "code": self.code,
        }
        return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


ResolveModels = Callable[[SynthesisConfig, LabelSpace], ResolvedSynthesisModels]


def open_or_create(
    config: SynthesisConfig,
    label_space: LabelSpace,
    threads: int,
    device: str,
    resolve_models: ResolveModels,
) -> SynthesisRunState:
    """Return what the output was begun with, or begin it.

    Args:
        config: Resolved.
        label_space: Of the masks.
        threads: As in :class:`Pinned`.
        device: As in :class:`Pinned`.
        resolve_models: Loads what a config names, to see what it is; only called to begin.

    Raises:
        ConfigError: The output was begun with other settings.
        IntegrityError: Its state is damaged.
        LorasegError: As raised by library, store and models.
    """
    output = open_store(config.output)

    def start() -> SynthesisRunState:
        return SynthesisRunState(
            config=config,
            classes=label_space.names,
            threads=threads,
            device=device,
            models=resolve_models(config, label_space),
            code=code_revision(),
        )

    known, begun = create_once(
        output,
        DATASET_KEY,
        lambda: read_run_state(output, config),
        start,
        SynthesisRunState.to_bytes,
    )
    if not begun:
        _check_same_run(known, config, label_space, threads, device)
        warn_code_changed(config.output, known.code)
    return known


def read_run_state(
    output: ObjectStore, config: SynthesisConfig | None = None
) -> SynthesisRunState | None:
    """Read ``dataset.json``; None if there is none.

    Args:
        output: The synthetic dataset.
        config: For what ``dataset.json`` leaves open; None to leave it at nothing.

    Raises:
        IntegrityError: It is damaged.
    """
    try:
        data = output.get(DATASET_KEY)
    except ObjectNotFoundError:
        return None
    try:
        values = json.loads(data)
        if values["format"] != _FORMAT:
            raise IntegrityError(
                f"{output.uri}/{DATASET_KEY}: format {values['format']!r}, expected {_FORMAT}"
            )
        free: dict[str, Any] = {"masks": output.uri, "output": output.uri}
        if config is not None:
            free = {key: configuration.to_dict(config)[key] for key in _MUTABLE_FIELDS}
            if config.segmenter and values["settings"]["segmenter"]:
                # It may lie elsewhere by now: its digest is compared when it is loaded.
                free["segmenter"] = config.segmenter
        built = configuration.build(SynthesisConfig, {**values["settings"], **free})
        if config is not None:
            more = replace(built.sampling, images=config.sampling.images)
            built = replace(built, sampling=more)
        facts = configuration.build(ResolvedSynthesisModels, values["facts"])
        names = LabelSpace(tuple(values["classes"])).names
        threads = int(values["threads"])
        if not 1 <= threads <= _MAX_THREADS:
            raise ValueError(f"threads {threads}, expected 1 to {_MAX_THREADS}")
        return SynthesisRunState(
            config=built,
            classes=names,
            threads=threads,
            device=str(values["device"]),
            models=facts,
            code=str(values["code"]),
        )
    except MALFORMED_INPUT_ERRORS as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"{output.uri}/{DATASET_KEY}: damaged: {error}") from error


def _settings(config: SynthesisConfig) -> dict[str, Any]:
    values = configuration.to_dict(config)
    for name in _MUTABLE_FIELDS:
        del values[name]
    return values


def _check_same_run(
    recorded: SynthesisRunState,
    config: SynthesisConfig,
    label_space: LabelSpace,
    threads: int,
    device: str,
) -> None:
    then = _flatten(_settings(recorded.config))
    then |= {
        "classes": list(recorded.classes),
        "threads": recorded.threads,
        "device": recorded.device,
    }
    now = _flatten(_settings(config))
    now |= {"classes": list(label_space.names), "threads": threads, "device": device}
    del then["sampling.images"], now["sampling.images"]
    check_same_settings(config.output, then, now)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
