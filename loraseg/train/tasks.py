"""Plan and run training tasks of any role. Running a task twice is safe."""

from collections.abc import Sequence

from loraseg.errors import ConfigError, LorasegError
from loraseg.train.core.progress import Progress, ProgressCallback
from loraseg.train.core.task import (
    AdapterJob,
    SharedResources,
    TaskResult,
    TrainingPlan,
    TrainingTask,
)
from loraseg.train.generator_adapters.task import GeneratorAdapterTask
from loraseg.train.roles import ROLES
from loraseg.train.segmenter_adapters.task import SegmenterAdapterTask

__all__ = [
    "GeneratorAdapterTask",
    "Progress",
    "ProgressCallback",
    "SegmenterAdapterTask",
    "TaskResult",
    "TrainingPlan",
    "TrainingTask",
    "group_tasks",
    "plan_task",
    "train_adapter",
    "train_adapter_group",
]


def plan_task(task: TrainingTask) -> TrainingPlan:
    """Check data, base and library, and describe what :func:`train_adapter` would do.

    Raises:
        DatasetError: The data cannot be used.
        IntegrityError: The weights of the base are damaged.
        StoreError: The library cannot be read.
    """
    return ROLES[task.role].load_job().prepare(task, SharedResources()).plan()


def train_adapter(
    task: TrainingTask, on_progress: ProgressCallback = lambda progress: None
) -> TaskResult:
    """Train, score and publish one adapter; do nothing if the task is published already.

    A run that was killed at any point resumes from its last checkpoint and publishes the same
    bytes.

    Args:
        task: The adapter to train.
        on_progress: Called about once per step; should return quickly.

    Raises:
        DatasetError: The data cannot be used, or has no labelled pixel.
        StageError: The loss is not finite, or there is nothing to learn from.
        StoreError: A store cannot be reached.
        IntegrityError: The weights of the base or the library are damaged.
    """
    (outcome,) = train_adapter_group((task,), on_progress)
    if isinstance(outcome, LorasegError):
        raise outcome
    return outcome


def group_tasks(tasks: Sequence[TrainingTask], *, max_size: int) -> list[tuple[int, ...]]:
    """Divide tasks into groups whose adapters share frozen work when they train together.

    The groups are segmenter adapters of one dataset and seed with "per_dataset" order whose rule
    adapts nothing of CLIP. An adapter's bytes do not depend on its group.

    Args:
        tasks: Tasks of any role.
        max_size: Largest number of tasks in a group.

    Returns:
        Indices into ``tasks``, each once; a task that shares nothing is a group of one.
    """
    groups: list[list[int]] = []
    open_groups: dict[object, list[int]] = {}
    for index, task in enumerate(tasks):
        key = task.group_key()
        group = open_groups.get(key) if key is not None else None
        if group is None or len(group) >= max_size:
            group = []
            groups.append(group)
            if key is not None:
                open_groups[key] = group
        group.append(index)
    return [tuple(group) for group in groups]


def train_adapter_group(
    tasks: Sequence[TrainingTask], on_progress: ProgressCallback = lambda progress: None
) -> list[TaskResult | LorasegError]:
    """Do what :func:`train_adapter` does for each task of a group, training them together.

    Args:
        tasks: A group of :func:`group_tasks`.
        on_progress: Called about once per step of each task; should return quickly.

    Returns:
        The result or the error of each task. An error ends the task that raised it only.

    Raises:
        ConfigError: The tasks are not one group.
    """
    if len(tasks) > 1 and len(group_tasks(tasks, max_size=len(tasks))) > 1:
        raise ConfigError(
            f"{', '.join(task.name for task in tasks)}: cannot be trained together; expected one "
            f"dataset, seed, base and order of data, and a rule that leaves CLIP as it is"
        )
    role, shared = ROLES[tasks[0].role], SharedResources()
    job_class = role.load_job()
    jobs: dict[int, AdapterJob] = {}
    outcomes: dict[int, TaskResult | LorasegError] = {}
    for index, task in enumerate(tasks):
        try:
            jobs[index] = job_class.prepare(task, shared)
        except LorasegError as error:
            outcomes[index] = error
    outcomes.update(zip(jobs, role.run_group(list(jobs.values()), on_progress), strict=True))
    return [outcomes[index] for index in range(len(tasks))]
