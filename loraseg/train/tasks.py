"""Adapters as units of work: plan them, run them, resume, publish. Safe to run twice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraseg.errors import ConfigError, LorasegError
from loraseg.train.generator_task import GeneratorTask
from loraseg.train.lora import Member, TrainedPairs, count_parameters, train_group
from loraseg.train.progress import Progress, Report
from loraseg.train.recipes import CLIP_IS_FROZEN, shared_part
from loraseg.train.unit import Loaded, TaskPlan, TaskResult
from loraseg.train.work import AdapterTask, Work

if TYPE_CHECKING:
    from loraseg.train.generator_work import GeneratorWork

__all__ = [
    "AdapterTask",
    "AnyTask",
    "GeneratorTask",
    "Progress",
    "Report",
    "TaskPlan",
    "TaskResult",
    "groups",
    "plan",
    "run_task",
    "run_tasks",
]

AnyTask = AdapterTask | GeneratorTask


def plan(task: AnyTask) -> TaskPlan:
    """Look at data, base and library and say what :func:`run_task` would do.

    Raises:
        DatasetError: The data cannot be used.
        IntegrityError: The base's weights are damaged.
        StoreError: The library cannot be read.
    """
    if isinstance(task, GeneratorTask):
        return _generator_work(task).plan()
    loaded = Loaded()
    work = Work.prepare(task, loaded)
    work.unit.check_images(loaded)
    return work.unit.plan(count_parameters(work.base.model, task.recipe))


def run_task(task: AnyTask, report: Report = lambda progress: None) -> TaskResult:
    """Train, score and publish one adapter, or find that this has been done.

    Killed at any point and run again, it goes on from its last checkpoint and publishes the same
    bytes. Done before with the same digest, it does nothing.

    Args:
        task: The unit of work.
        report: Called about once a step; should return quickly.

    Raises:
        DatasetError: The data cannot be used, or holds no labelled pixel.
        StageError: The loss is not finite, or there was nothing to learn from.
        StoreError: A store cannot be reached.
        IntegrityError: The base's weights or the library are damaged.
    """
    (outcome,) = run_tasks((task,), report)
    if isinstance(outcome, LorasegError):
        raise outcome
    return outcome


def groups(tasks: Sequence[AnyTask], *, most: int) -> list[tuple[int, ...]]:
    """Divide tasks into groups whose adapters share work when they are trained together.

    Those are segmenters' adapters of one dataset and seed with "per_dataset" order whose rule
    leaves CLIP as it is. What becomes of an adapter does not depend on its group.

    Args:
        tasks: Any.
        most: Most tasks in a group.

    Returns:
        Positions in ``tasks``, each once; a task that shares nothing is a group of one.
    """
    found: list[list[int]] = []
    latest: dict[object, list[int]] = {}
    for index, task in enumerate(tasks):
        key = _group_key(task)
        group = latest.get(key) if key is not None else None
        if group is None or len(group) >= most:
            group = []
            found.append(group)
            if key is not None:
                latest[key] = group
        group.append(index)
    return [tuple(group) for group in found]


def run_tasks(
    tasks: Sequence[AnyTask], report: Report = lambda progress: None
) -> list[TaskResult | LorasegError]:
    """Do :func:`run_task` for each of a group from :func:`groups`, training side by side.

    Args:
        tasks: The group.
        report: Called about once a step of each; should return quickly.

    Returns:
        For each task its result, or the error that ended it and none of the others.

    Raises:
        ConfigError: Several tasks that are no group.
    """
    if len(tasks) > 1 and len(groups(tasks, most=len(tasks))) > 1:
        raise ConfigError(
            f"{', '.join(task.name for task in tasks)}: cannot be trained together; expected one "
            f"dataset, seed, base and order of data, and a rule that leaves CLIP as it is"
        )
    loaded, works = Loaded(), dict[int, tuple[Work, Member]]()
    outcomes: dict[int, TaskResult | LorasegError] = {}
    for index, task in enumerate(tasks):
        try:
            if isinstance(task, GeneratorTask):
                outcomes[index] = _generator_work(task).run(report)
                continue
            work = Work.prepare(task, loaded)
            done = work.unit.found_done()
            if done is None:
                work.unit.check_images(loaded)
                works[index] = work, work.member(report)
            else:
                outcomes[index] = done
        except LorasegError as error:
            outcomes[index] = error
    trained_pairs = _train(list(works.values()))
    for (index, (work, _)), trained in zip(works.items(), trained_pairs, strict=True):
        try:
            outcomes[index] = trained if isinstance(trained, LorasegError) else work.finish(trained)
        except LorasegError as error:
            outcomes[index] = error
    return [outcomes[index] for index in range(len(tasks))]


def _generator_work(task: GeneratorTask) -> "GeneratorWork":
    # Here, so that workers that train segmenters do not load what diffusion takes.
    from loraseg.train.generator_work import GeneratorWork

    return GeneratorWork.prepare(task)


def _group_key(task: AnyTask) -> object | None:
    """Return what members of a group have in common, None if a task shares nothing."""
    if isinstance(task, GeneratorTask):
        return None
    if task.data_order != "per_dataset" or task.recipe.targets not in CLIP_IS_FROZEN:
        return None
    data = (task.data, task.split, task.val_split, task.images, task.seed, task.skip_bad)
    return *data, task.base, task.encoder, shared_part(task.recipe)


def _train(works: Sequence[tuple[Work, Member]]) -> list[TrainedPairs | LorasegError]:
    if not works:
        return []
    first = works[0][0]
    for work, _ in works:
        work.unit.pace.restart()
    members = [member for _, member in works]
    try:
        names = first.unit.dataset.label_space.names
        return train_group(first.base, first.training_images(), names, members)
    except LorasegError as error:
        return [error] * len(works)
