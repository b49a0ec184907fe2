"""The run state of a segmentation output."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from loraseg.batch.core.executor import Executor
from loraseg.batch.core.state import RunState, RunStateFormat, open_or_create
from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.library.catalog import Library
from loraseg.revision import code_revision
from loraseg.storage import open_store

__all__ = [
    "STATE_FORMAT",
    "ResolveModels",
    "ResolvedSegmentationModels",
    "SegmentationRunState",
    "open_run_state",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedSegmentationModels:
    """What the model names of a config resolved to.

    Attributes:
        base: sha256 of the base model.
        encoder: Id of the encoder whose centroids are searched.
        clip_attention_lora: Whether adapters of the CLIP attention act.
        vacancy: Why the library has no usable adapter; None if it has some.
    """

    base: str
    encoder: str
    clip_attention_lora: str
    vacancy: str | None


SegmentationRunState = RunState[SegmentImagesConfig, ResolvedSegmentationModels]
ResolveModels = Callable[[SegmentImagesConfig], ResolvedSegmentationModels]

# The output itself is not recorded: it may be moved.
STATE_FORMAT = RunStateFormat(
    key="state.json",
    config=SegmentImagesConfig,
    models=ResolvedSegmentationModels,
    settings_key="config",
    has_classes=False,
    unstored=("output",),
)


def open_run_state(
    config: SegmentImagesConfig, executor: Executor, resolve_models: ResolveModels
) -> SegmentationRunState:
    """Return the run state of an output; create it in the first run.

    Args:
        config: Resolved config. Without a generation it takes that of the first run.
        executor: Runs ``resolve_models`` where the models are.
        resolve_models: Loads the models of a config; called in the first run only.

    Raises:
        ConfigError: The output was created with other settings.
        IntegrityError: Its run state is damaged.
        LorasegError: As raised by library, store and models.
    """

    def resolve() -> tuple[SegmentImagesConfig, ResolvedSegmentationModels]:
        first = config
        if config.generation is None and config.library is not None:
            generation = Library(open_store(config.library)).generation()
            first = replace(config, generation=generation)
        return first, executor.call(resolve_models, first)

    def complete(settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "output": config.output}

    requested = RunState(
        config=config,
        classes=config.label_space().names,
        threads=executor.threads,
        device=executor.device,
        models=None,
        code=code_revision(),
    )
    return open_or_create(
        STATE_FORMAT,
        open_store(config.output),
        requested,
        resolve,
        complete,
        mutable=("generation",) if config.generation is None else (),
    )
