"""The roles of adapters that can be trained, one row per role."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from loraseg.backbones.weights import absolute_spec
from loraseg.errors import LorasegError
from loraseg.library.card import Role
from loraseg.storage import absolute_uri
from loraseg.train.core.progress import ProgressCallback
from loraseg.train.core.task import AdapterJob, TaskResult, TrainingTask, run_each
from loraseg.train.generator_adapters.recipes import named_generator_recipe
from loraseg.train.generator_adapters.targets import absolute_targets
from loraseg.train.generator_adapters.task import ActiveAdapter, GeneratorAdapterTask
from loraseg.train.segmenter_adapters.recipes import named_recipe
from loraseg.train.segmenter_adapters.task import SegmenterAdapterTask

__all__ = ["ROLES", "RoleSettings", "TrainingRole"]

GroupRunner = Callable[[Sequence[Any], ProgressCallback], list[TaskResult | LorasegError]]


@runtime_checkable
class RoleSettings(Protocol):
    """The fields of a :class:`~loraseg.train.manifest.TrainingManifest` that single roles read."""

    @property
    def encoder(self) -> str:
        """For segmenters, the CLIP of the index."""
        ...

    @property
    def active(self) -> tuple[ActiveAdapter, ...]:
        """For generators, adapters merged into the base during training."""
        ...

    @property
    def cache(self) -> str | None:
        """For generators, the store URI of latents and encoded prompts."""
        ...

    @property
    def output(self) -> str | None:
        """For generators, the store URI of reports."""
        ...


def _no_fields(settings: RoleSettings) -> dict[str, Any]:
    del settings
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRole:
    """How adapters of one role are configured, trained and listed.

    Attributes:
        task: Task class; its ``role`` is the key of the row.
        load_job: Returns the job class. A function, since importing a job may import diffusers.
        run_group: Runs jobs whose tasks have equal group keys.
        named_recipe: Returns a recipe by name with overrides applied, the later ones last.
        default_recipe: Name of the recipe of a manifest without one.
        task_fields: Fields of the task, beyond those of all roles, that a manifest decides.
        manifest_fields: Manifest fields that are for this role only.
        columns: Metrics in the order of their columns in the result table.
    """

    task: type[TrainingTask]
    load_job: Callable[[], type[AdapterJob]]
    run_group: GroupRunner = run_each
    named_recipe: Callable[..., Any]
    default_recipe: str
    task_fields: Callable[[RoleSettings], dict[str, Any]] = _no_fields
    manifest_fields: tuple[str, ...] = ()
    columns: tuple[str, ...]


def _segmenter_job() -> type[AdapterJob]:
    from loraseg.train.segmenter_adapters.job import SegmenterAdapterJob

    return SegmenterAdapterJob


def _run_segmenter_group(
    jobs: Sequence[Any], on_progress: ProgressCallback
) -> list[TaskResult | LorasegError]:
    from loraseg.train.segmenter_adapters.job import run_group

    return run_group(jobs, on_progress)


def _segmenter_fields(settings: RoleSettings) -> dict[str, Any]:
    return {"encoder": absolute_spec(settings.encoder)}


def _generator_job() -> type[AdapterJob]:
    from loraseg.train.generator_adapters.job import GeneratorAdapterJob

    return GeneratorAdapterJob


def _generator_recipe(name: str, *overrides: Mapping[str, Any]) -> Any:
    recipe = named_generator_recipe(name, *overrides)
    return replace(recipe, targets=absolute_targets(recipe.targets))


def _generator_fields(settings: RoleSettings) -> dict[str, Any]:
    return {
        "active": settings.active,
        "cache": settings.cache and absolute_uri(settings.cache),
        "output": settings.output and absolute_uri(settings.output),
    }


ROLES: Mapping[Role, TrainingRole] = {
    "segmenter": TrainingRole(
        task=SegmenterAdapterTask,
        load_job=_segmenter_job,
        run_group=_run_segmenter_group,
        named_recipe=named_recipe,
        default_recipe="miniature",
        task_fields=_segmenter_fields,
        columns=("miou", "miou_base"),
    ),
    "generator": TrainingRole(
        task=GeneratorAdapterTask,
        load_job=_generator_job,
        named_recipe=_generator_recipe,
        default_recipe="matchmask-miniature",
        task_fields=_generator_fields,
        manifest_fields=("active", "cache", "output"),
        columns=("train_loss", "val_loss", "val_loss_base"),
    ),
}
