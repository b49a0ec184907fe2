"""The run state of a synthetic dataset."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraseg import config as configuration
from loraseg.batch.core.executor import Executor
from loraseg.batch.core.state import RunState, RunStateFormat, open_or_create
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.data.labels import LabelSpace
from loraseg.revision import code_revision
from loraseg.storage import ObjectStore, open_store

__all__ = [
    "STATE_FORMAT",
    "ResolveModels",
    "ResolvedAdapter",
    "ResolvedSynthesisModels",
    "SynthesisRunState",
    "open_run_state",
    "read_run_state",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedAdapter:
    """An adapter as the first run loaded it.

    Attributes:
        spec: Where it is, with the version if it is in a library.
        name: Name in its card.
        digest: sha256 of its files.
    """

    spec: str
    name: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedSynthesisModels:
    """What the model names of a config resolved to.

    Attributes:
        base: sha256 of the diffusion model.
        adapters: The adapters in the order of the config.
        generator: Digest of all that determines an image besides mask and seed.
        segmenter: sha256 of the segmenter's file; None without one.
        class_loss: The segmenter's mean loss on real images by class, for FreeMask; None for a
            class that they do not show, and None altogether for other filters.
    """

    base: str
    adapters: tuple[ResolvedAdapter, ...]
    generator: str
    segmenter: str | None = None
    class_loss: tuple[float | None, ...] | None = None


SynthesisRunState = RunState[SynthesisConfig, ResolvedSynthesisModels]
ResolveModels = Callable[[SynthesisConfig, LabelSpace], ResolvedSynthesisModels]

# Not recorded, since later runs may change them: which masks, how many, and the size of a unit.
_UNSTORED = ("masks", "output", "split", "classes", "limit", "masks_per_shard", "append")
# Recorded, but later runs may generate more images of each mask.
_MUTABLE = ("sampling.images",)

STATE_FORMAT = RunStateFormat(
    key="dataset.json",
    config=SynthesisConfig,
    models=ResolvedSynthesisModels,
    settings_key="settings",
    has_classes=True,
    unstored=_UNSTORED,
)


def open_run_state(
    config: SynthesisConfig,
    label_space: LabelSpace,
    executor: Executor,
    resolve_models: ResolveModels,
) -> SynthesisRunState:
    """Return the run state of an output; create it in the first run.

    Args:
        config: Resolved config.
        label_space: Classes of the pairs.
        executor: Runs ``resolve_models`` where the models are.
        resolve_models: Loads the models of a config; called in the first run only.

    Raises:
        ConfigError: The output was created with other settings.
        IntegrityError: Its run state is damaged.
        LorasegError: As raised by library, store and models.
    """
    requested = RunState(
        config=config,
        classes=label_space.names,
        threads=executor.threads,
        device=executor.device,
        models=None,
        code=code_revision(),
    )
    return open_or_create(
        STATE_FORMAT,
        open_store(config.output),
        requested,
        lambda: (config, executor.call(resolve_models, config, label_space)),
        lambda settings: _complete(settings, config),
        mutable=_MUTABLE,
    )


def read_run_state(output: ObjectStore) -> SynthesisRunState | None:
    """Read the run state of a synthetic dataset; None if there is none.

    Config fields that are not recorded have their default, and ``masks`` is the dataset itself.

    Raises:
        IntegrityError: It is damaged.
        StoreError: The store cannot be read.
    """

    def complete(settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "masks": output.uri, "output": output.uri}

    return STATE_FORMAT.read(output, complete)


def _complete(settings: dict[str, Any], config: SynthesisConfig) -> dict[str, Any]:
    """Add the fields of this run that are not recorded or may change."""
    values = configuration.to_dict(config)
    complete = {**settings, **{name: values[name] for name in _UNSTORED}}
    complete["sampling"] = {**settings["sampling"], "images": config.sampling.images}
    if config.segmenter and settings["segmenter"]:
        # The file may have been moved: its digest is compared when it is loaded.
        complete["segmenter"] = config.segmenter
    return complete
