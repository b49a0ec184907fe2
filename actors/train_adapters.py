"""Train many adapters in parallel, each in one Ray task.

Why tasks and not Ray Train: a ``TorchTrainer`` run starts a controller and a worker group, which
takes 15 s and more before the first step, and an error in one worker restarts the whole group. An
adapter is small, fits one worker and trains for minutes, so a task costs about a second and
isolates failures. :mod:`actors.train_segmenter` uses ``TorchTrainer`` for one large model.

Adapters that share frozen work (a sweep over one dataset, see
:func:`~loraseg.train.tasks.group_tasks`) form one task, in groups small enough to occupy every
worker.

Ray restarts a task that loses its worker or node; it resumes from the last checkpoint in the store.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.resources import ResourceConfig, alive_nodes, start_on_driver_node
from actors.tasks import run_ray_tasks
from loraseg.errors import LorasegError
from loraseg.train.core.progress import Progress, ProgressCallback
from loraseg.train.core.progress_tracker import ProgressTracker, TaskProgress, format_changes
from loraseg.train.tasks import TaskResult, TrainingTask, group_tasks, train_adapter_group

__all__ = ["TrainingOutcome", "train_adapters"]

logger = logging.getLogger(__name__)

_REPORT_INTERVAL_S = 0.5

TaskRunner = Callable[[Sequence[TrainingTask], ProgressCallback], list[TaskResult | LorasegError]]
ProgressWatcher = Callable[[Mapping[str, TaskProgress]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """The result of one adapter, or the reason of its failure."""

    name: str
    result: TaskResult | None
    error: str | None


def train_adapters(
    tasks: Sequence[TrainingTask],
    resources: ResourceConfig,
    *,
    runner: TaskRunner = train_adapter_group,
    on_progress: ProgressWatcher | None = None,
    poll_interval_s: float = 5.0,
) -> Iterator[TrainingOutcome]:
    """Train adapters on the connected Ray cluster and yield the outcome of each as it completes.

    An error of one adapter ends that adapter only and becomes its outcome.

    Args:
        tasks: The adapters to train.
        resources: Resources of each, how many train at once, and how often a lost worker is
            replaced.
        runner: Called in a worker with the tasks of one group.
        on_progress: Called with the progress of every adapter at each poll; by default changes are
            logged, one line each.
        poll_interval_s: Seconds between two polls of the progress.
    """
    _warn_resource_mismatch(tasks, resources)
    logger.info("training %d adapters, %s each", len(tasks), resources)
    # A restart of the actor loses the displayed progress, not the training.
    tracker = start_on_driver_node(ProgressTracker, max_restarts=-1)
    poller = _ProgressPoller(tracker, on_progress or _change_logger(), poll_interval_s)
    groups = [
        [tasks[index] for index in group]
        for group in group_tasks(
            tasks, max_size=-(-len(tasks) // _parallel_workers(len(tasks), resources))
        )
    ]
    names = [[task.name for task in group] for group in groups]
    calls = [
        (f"train {', '.join(members)}", (runner, group, tracker))
        for members, group in zip(names, groups, strict=True)
    ]
    for index, reference in run_ray_tasks(
        _run_with_progress, calls, resources, tick=poller.poll, tick_s=poll_interval_s
    ):
        yield from _to_outcomes(names[index], reference)


def _parallel_workers(tasks: int, resources: ResourceConfig) -> int:
    """Return how many adapters train at once: the user's limit, or what fits the cluster now.

    If nothing fits, the autoscaler adds an unknown number of nodes: then all tasks.
    """
    needs = {"CPU": resources.cpus, "GPU": resources.gpus}
    nodes = [node["Resources"] for node in alive_nodes()]
    capacity = sum(
        min(int(node.get(kind, 0) / need) for kind, need in needs.items() if need)
        for node in nodes
        if resources.node is None or resources.node in node
    )
    return resources.max_parallel or capacity or max(tasks, 1)


def _warn_resource_mismatch(tasks: Sequence[TrainingTask], resources: ResourceConfig) -> None:
    """Log settings that work but are probably a mistake."""
    threads = max((task.recipe.threads for task in tasks), default=0)
    if threads > resources.cpus:
        logger.warning(
            "an adapter trains with %d threads but reserves only %g CPUs",
            threads,
            resources.cpus,
        )
    hosts = {node["NodeManagerAddress"] for node in alive_nodes()}
    uris = {uri for task in tasks for uri in task.required_uris()}
    local = sorted(uri for uri in uris if not uri.startswith("s3://"))
    if len(hosts) > 1 and local:
        logger.warning(
            "%s must exist on all %d machines: use s3:// or a shared folder", local[0], len(hosts)
        )


def _run_with_progress(
    runner: TaskRunner, tasks: Sequence[TrainingTask], tracker: Any
) -> list[TaskResult | LorasegError]:
    return runner(tasks, _RemoteProgressReporter(tracker))


class _RemoteProgressReporter:
    """Sends progress to the tracker, at most twice a second per phase, without waiting for it."""

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self._worker = f"{ray.get_runtime_context().get_node_id()}:{os.getpid()}"
        self._sent: dict[str, tuple[str, float]] = {}

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        phase, sent_at = self._sent.get(progress.name, ("", 0.0))
        if progress.phase == phase and now - sent_at < _REPORT_INTERVAL_S:
            return
        self._sent[progress.name] = progress.phase, now
        self._tracker.put.remote(progress, self._worker)


class _ProgressPoller:
    """Reads the tracker; skips a poll that the tracker does not answer in time."""

    def __init__(self, tracker: Any, on_progress: ProgressWatcher, interval_s: float) -> None:
        self._tracker, self._on_progress, self._interval_s = tracker, on_progress, interval_s

    def poll(self) -> None:
        try:
            progress: Any = ray.get(self._tracker.read.remote(), timeout=self._interval_s)
        except RayError as error:
            logger.debug("the progress tracker did not answer: %s", error)
            return
        self._on_progress(progress)


def _change_logger() -> ProgressWatcher:
    last: dict[str, TaskProgress] = {}

    def log(current: Mapping[str, TaskProgress]) -> None:
        for line in format_changes(last, current):
            logger.info("%s", line)
        last.update(current)

    return log


def _to_outcomes(names: Sequence[str], reference: Any) -> list[TrainingOutcome]:
    """Return the outcome of each adapter of a group; a lost worker fails all of them."""
    try:
        results: list[TaskResult | LorasegError] = ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, LorasegError):
            logger.error("%s: unexpected error in its worker:\n%s", ", ".join(names), error)
        return [_failure(name, f"{type(cause).__name__}: {cause}") for name in names]
    except RayError as error:
        reason = f"{type(error).__name__}: its worker was lost: {error}"
        return [_failure(name, reason) for name in names]
    return [_to_outcome(name, result) for name, result in zip(names, results, strict=True)]


def _to_outcome(name: str, result: TaskResult | LorasegError) -> TrainingOutcome:
    if isinstance(result, LorasegError):
        return _failure(name, f"{type(result).__name__}: {result}")
    logger.info("%s: %s", name, "already published" if result.skipped else "published")
    return TrainingOutcome(name, result, None)


def _failure(name: str, reason: str) -> TrainingOutcome:
    logger.error("%s: failed: %s", name, reason)
    return TrainingOutcome(name, None, reason)
