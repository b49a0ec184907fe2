"""Adapters as units of work: plan them, run them, resume, publish. Safe to run twice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraseg.errors import ConfigError, LorasegError
from loraseg.train.core.progress import Progress, ProgressCallback
from loraseg.train.core.task import SharedResources, TaskResult, TrainingPlan
from loraseg.train.generator_adapters.task import GeneratorAdapterTask
from loraseg.train.segmenter_adapters.job import SegmenterAdapterJob, SegmenterAdapterTask
from loraseg.train.segmenter_adapters.recipes import RULES_WITHOUT_CLIP, group_signature
from loraseg.train.segmenter_adapters.training import (
    GroupMember,
    TrainedPairs,
    count_parameters,
    train_group,
)

if TYPE_CHECKING:
    from loraseg.train.generator_adapters.job import GeneratorAdapterJob

__all__ = [
    "AnyAdapterTask",
    "GeneratorAdapterTask",
    "Progress",
    "ProgressCallback",
    "SegmenterAdapterTask",
    "TaskResult",
    "TrainingPlan",
    "group_tasks",
    "plan_task",
    "train_adapter",
    "train_adapter_group",
]

AnyAdapterTask = SegmenterAdapterTask | GeneratorAdapterTask


def plan_task(task: AnyAdapterTask) -> TrainingPlan:
    """Look at data, base and library and say what :func:`run_task` would do.

    Raises:
        DatasetError: The data cannot be used.
        IntegrityError: The base's weights are damaged.
        StoreError: The library cannot be read.
    """
    if isinstance(task, GeneratorAdapterTask):
        return _prepare_generator_job(task).plan()
    loaded = SharedResources()
    work = SegmenterAdapterJob.prepare(task, loaded)
    work.training_run.check_images(loaded)
    return work.training_run.plan(count_parameters(work.base.model, task.recipe))


def train_adapter(
    task: AnyAdapterTask, on_progress: ProgressCallback = lambda progress: None
) -> TaskResult:
    """Train, score and publish one adapter, or find that this has been done.

    Killed at any point and run again, it goes on from its last checkpoint and publishes the same
    bytes. Done before with the same digest, it does nothing.

    Args:
        task: The unit of work.
        on_progress: Called about once a step; should return quickly.

    Raises:
        DatasetError: The data cannot be used, or holds no labelled pixel.
        StageError: The loss is not finite, or there was nothing to learn from.
        StoreError: A store cannot be reached.
        IntegrityError: The base's weights or the library are damaged.
    """
    (outcome,) = train_adapter_group((task,), on_progress)
    if isinstance(outcome, LorasegError):
        raise outcome
    return outcome


def group_tasks(tasks: Sequence[AnyAdapterTask], *, max_size: int) -> list[tuple[int, ...]]:
    """Divide tasks into groups whose adapters share work when they are trained together.

    Those are segmenters' adapters of one dataset and seed with "per_dataset" order whose rule
    leaves CLIP as it is. What becomes of an adapter does not depend on its group.

    Args:
        tasks: Any.
        max_size: Most tasks in a group.

    Returns:
        Positions in ``tasks``, each once; a task that shares nothing is a group of one.
    """
    found: list[list[int]] = []
    latest: dict[object, list[int]] = {}
    for index, task in enumerate(tasks):
        key = _group_key(task)
        group = latest.get(key) if key is not None else None
        if group is None or len(group) >= max_size:
            group = []
            found.append(group)
            if key is not None:
                latest[key] = group
        group.append(index)
    return [tuple(group) for group in found]


def train_adapter_group(
    tasks: Sequence[AnyAdapterTask], on_progress: ProgressCallback = lambda progress: None
) -> list[TaskResult | LorasegError]:
    """Do :func:`run_task` for each of a group from :func:`groups`, training side by side.

    Args:
        tasks: The group.
        on_progress: Called about once a step of each; should return quickly.

    Returns:
        For each task its result, or the error that ended it and none of the others.

    Raises:
        ConfigError: Several tasks that are no group.
    """
    if len(tasks) > 1 and len(group_tasks(tasks, max_size=len(tasks))) > 1:
        raise ConfigError(
            f"{', '.join(task.name for task in tasks)}: cannot be trained together; expected one "
            f"dataset, seed, base and order of data, and a rule that leaves CLIP as it is"
        )
    loaded, works = SharedResources(), dict[int, tuple[SegmenterAdapterJob, GroupMember]]()
    outcomes: dict[int, TaskResult | LorasegError] = {}
    for index, task in enumerate(tasks):
        try:
            if isinstance(task, GeneratorAdapterTask):
                outcomes[index] = _prepare_generator_job(task).run(on_progress)
                continue
            work = SegmenterAdapterJob.prepare(task, loaded)
            done = work.training_run.find_published()
            if done is None:
                work.training_run.check_images(loaded)
                works[index] = work, work.group_member(on_progress)
            else:
                outcomes[index] = done
        except LorasegError as error:
            outcomes[index] = error
    trained_pairs = _train_jobs(list(works.values()))
    for (index, (work, _)), trained in zip(works.items(), trained_pairs, strict=True):
        try:
            outcomes[index] = (
                trained if isinstance(trained, LorasegError) else work.score_and_publish(trained)
            )
        except LorasegError as error:
            outcomes[index] = error
    return [outcomes[index] for index in range(len(tasks))]


def _prepare_generator_job(task: GeneratorAdapterTask) -> "GeneratorAdapterJob":
    # Here, so that workers that train segmenters do not load what diffusion takes.
    from loraseg.train.generator_adapters.job import GeneratorAdapterJob

    return GeneratorAdapterJob.prepare(task)


def _group_key(task: AnyAdapterTask) -> object | None:
    """Return what members of a group have in common, None if a task shares nothing."""
    if isinstance(task, GeneratorAdapterTask):
        return None
    if task.data_order != "per_dataset" or task.recipe.targets not in RULES_WITHOUT_CLIP:
        return None
    data = (task.data, task.split, task.val_split, task.images, task.seed, task.skip_bad)
    return *data, task.base, task.encoder, group_signature(task.recipe)


def _train_jobs(
    jobs: Sequence[tuple[SegmenterAdapterJob, GroupMember]],
) -> list[TrainedPairs | LorasegError]:
    if not jobs:
        return []
    first = jobs[0][0]
    for work, _ in jobs:
        work.training_run.progress.restart_throughput()
    members = [member for _, member in jobs]
    try:
        names = first.training_run.dataset.label_space.names
        return train_group(first.base, first.training_images(), names, members)
    except LorasegError as error:
        return [error] * len(jobs)
