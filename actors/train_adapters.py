"""Train many adapters at once, each as one plain Ray task.

Why tasks and not Ray Train: a ``TorchTrainer`` run starts a controller and a worker group, which
costs 15 s and more before the first step, and an error in one worker restarts the whole group. An
adapter is small, fits one worker and takes minutes, so a task costs about a second and keeps
failures apart. ``TorchTrainer`` with DDP is for one large model and comes with the segmenter
trainer.

Adapters that share frozen work (a sweep over one dataset, see ``groups``) go into one task, but
only so many that every worker has something to do.

A task that loses its worker or node is started again by Ray and resumes by itself from the last
checkpoint in the store.
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
    """How one adapter ended: with a result, or with the reason of its failure."""

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
    """Run all tasks on the connected Ray cluster and yield each as it ends, in order of arrival.

    A task's own error ends that task alone and is told in its outcome.

    Args:
        tasks: Units of work, safe to start again after a kill at any point.
        resources: What each takes, how many at once, how many lost workers are made up for.
        runner: What a worker calls for adapters that share work, or for a single one.
        on_progress: Given the standing of every adapter from time to time; by default each change
            is logged in one line.
        poll_interval_s: Seconds between two readings of the progress.
    """
    _warn_resource_mismatch(tasks, resources)
    logger.info("training %d adapters, %s each", len(tasks), resources)
    # An actor that is restarted loses the progress and keeps the training.
    board = start_on_driver_node(ProgressTracker, max_restarts=-1)
    view = _ProgressPoller(board, on_progress or _change_logger(), poll_interval_s)
    units = [
        [tasks[index] for index in group]
        for group in group_tasks(
            tasks, max_size=-(-len(tasks) // _parallel_workers(len(tasks), resources))
        )
    ]
    calls = [
        (f"train {', '.join(task.name for task in unit)}", (runner, unit, board)) for unit in units
    ]
    for index, reference in run_ray_tasks(
        _run_with_progress, calls, resources, tick=view.poll, tick_s=poll_interval_s
    ):
        yield from _to_outcomes([task.name for task in units[index]], reference)


def _parallel_workers(tasks: int, resources: ResourceConfig) -> int:
    """How many adapters train at once: as many as the user says, else as the cluster now holds.

    With no room at all the autoscaler is to bring nodes, it is not known how many.
    """
    needs = {"CPU": resources.cpus, "GPU": resources.gpus}
    nodes = [node["Resources"] for node in alive_nodes()]
    room = sum(
        min(int(node.get(kind, 0) / need) for kind, need in needs.items() if need)
        for node in nodes
        if resources.node is None or resources.node in node
    )
    return resources.max_parallel or room or max(tasks, 1)


def _warn_resource_mismatch(tasks: Sequence[TrainingTask], resources: ResourceConfig) -> None:
    """Say what works but is hardly meant."""
    threads = max((task.recipe.threads for task in tasks), default=0)
    if threads > resources.cpus:
        logger.warning(
            "an adapter trains with %d threads but only %g CPUs are set aside for it",
            threads,
            resources.cpus,
        )
    hosts = {node["NodeManagerAddress"] for node in alive_nodes()}
    places = {place for task in tasks for place in task.required_uris()}
    local = sorted(place for place in places if not place.startswith("s3://"))
    if len(hosts) > 1 and local:
        logger.warning("%d machines must all find %s: use s3:// or share it", len(hosts), local[0])


def _run_with_progress(
    runner: TaskRunner, tasks: Sequence[TrainingTask], tracker: Any
) -> list[TaskResult | LorasegError]:
    return runner(tasks, _RemoteProgressReporter(tracker))


class _RemoteProgressReporter:
    """Sends progress to the board without waiting for it, a few times a second at most."""

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
    """Reads the board now and then; a board that does not answer holds up nothing."""

    def __init__(self, tracker: Any, on_progress: ProgressWatcher, interval_s: float) -> None:
        self._tracker, self._on_progress, self._interval_s = tracker, on_progress, interval_s

    def poll(self) -> None:
        try:
            standings: Any = ray.get(self._tracker.read.remote(), timeout=self._interval_s)
        except RayError as error:
            logger.debug("the progress board did not answer: %s", error)
            return
        self._on_progress(standings)


def _change_logger() -> ProgressWatcher:
    last: dict[str, TaskProgress] = {}

    def log(standings: Mapping[str, TaskProgress]) -> None:
        for line in format_changes(last, standings):
            logger.info("%s", line)
        last.update(standings)

    return log


def _to_outcomes(names: Sequence[str], reference: Any) -> list[TrainingOutcome]:
    """Return how each adapter of a unit ended; a lost unit or a fault of ours ends all of them."""
    try:
        results: list[TaskResult | LorasegError] = ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, LorasegError):
            logger.error("%s: unexpected error in its worker:\n%s", ", ".join(names), error)
        return [_failure(name, f"{type(cause).__name__}: {cause}") for name in names]
    except RayError as error:
        reason = f"{type(error).__name__}: lost by the cluster: {error}"
        return [_failure(name, reason) for name in names]
    return [_to_outcome(name, result) for name, result in zip(names, results, strict=True)]


def _to_outcome(name: str, result: TaskResult | LorasegError) -> TrainingOutcome:
    if isinstance(result, LorasegError):
        return _failure(name, f"{type(result).__name__}: {result}")
    logger.info("%s: %s", name, "published before" if result.skipped else "published")
    return TrainingOutcome(name, result, None)


def _failure(name: str, reason: str) -> TrainingOutcome:
    logger.error("%s: failed: %s", name, reason)
    return TrainingOutcome(name, None, reason)
