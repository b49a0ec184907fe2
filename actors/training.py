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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.resources import Placement
from actors.units import run_units
from loraseg.errors import LorasegError
from loraseg.train.board import ProgressBoard, Standing, changes
from loraseg.train.progress import Progress, Report
from loraseg.train.tasks import AnyTask, TaskResult, groups, run_tasks

__all__ = ["Outcome", "train_adapters"]

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.5

Run = Callable[[Sequence[AnyTask], Report], list[TaskResult | LorasegError]]
Watch = Callable[[Mapping[str, Standing]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How one adapter ended: with a result, or with the reason of its failure."""

    name: str
    result: TaskResult | None
    error: str | None


def train_adapters(
    tasks: Sequence[AnyTask],
    placement: Placement,
    *,
    run: Run = run_tasks,
    watch: Watch | None = None,
    read_every_s: float = 5.0,
) -> Iterator[Outcome]:
    """Run all tasks on the connected Ray cluster and yield each as it ends, in order of arrival.

    A task's own error ends that task alone and is told in its outcome.

    Args:
        tasks: Units of work, safe to start again after a kill at any point.
        placement: What each takes, how many at once, how many lost workers are made up for.
        run: What a worker calls for adapters that share work, or for a single one.
        watch: Given the standing of every adapter from time to time; by default each change is
            logged in one line.
        read_every_s: Seconds between two readings of the progress.
    """
    _warn(tasks, placement)
    logger.info("training %d adapters, %s each", len(tasks), placement)
    board = _start_board()
    view = _View(board, watch or _log_changes(), read_every_s)
    units = [
        [tasks[index] for index in group]
        for group in groups(tasks, most=-(-len(tasks) // _workers(len(tasks), placement)))
    ]
    calls = [
        (f"train {', '.join(task.name for task in unit)}", (run, unit, board)) for unit in units
    ]
    for index, reference in run_units(
        _run_reporting, calls, placement, tick=view.refresh, tick_s=read_every_s
    ):
        yield from _outcomes([task.name for task in units[index]], reference)


def _workers(tasks: int, placement: Placement) -> int:
    """How many adapters train at once: as many as the user says, else as the cluster now holds.

    With no room at all the autoscaler is to bring nodes, it is not known how many.
    """
    needs = {"CPU": placement.cpus, "GPU": placement.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        min(int(node.get(kind, 0) / need) for kind, need in needs.items() if need)
        for node in nodes
        if placement.node is None or placement.node in node
    )
    return placement.max_parallel or room or max(tasks, 1)


def _warn(tasks: Sequence[AnyTask], placement: Placement) -> None:
    """Say what works but is hardly meant."""
    threads = max((task.recipe.threads for task in tasks), default=0)
    if threads > placement.cpus:
        logger.warning(
            "an adapter trains with %d threads but only %g CPUs are set aside for it",
            threads,
            placement.cpus,
        )
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    places = {place for task in tasks for place in task.places()}
    local = sorted(place for place in places if not place.startswith("s3://"))
    if len(hosts) > 1 and local:
        logger.warning("%d machines must all find %s: use s3:// or share it", len(hosts), local[0])


def _start_board() -> Any:
    # On the driver's own node: a node that is lost without the driver must not take the board.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(ProgressBoard)
    return actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


def _run_reporting(
    run: Run, tasks: Sequence[AnyTask], board: Any
) -> list[TaskResult | LorasegError]:
    return run(tasks, _Reporter(board))


class _Reporter:
    """Sends progress to the board without waiting for it, a few times a second at most."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._worker = f"{ray.get_runtime_context().get_node_id()}:{os.getpid()}"
        self._sent: dict[str, tuple[str, float]] = {}

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        phase, sent_at = self._sent.get(progress.name, ("", 0.0))
        if progress.phase == phase and now - sent_at < _REPORT_EVERY_S:
            return
        self._sent[progress.name] = progress.phase, now
        self._board.put.remote(progress, self._worker)


class _View:
    """Reads the board now and then; a board that does not answer holds up nothing."""

    def __init__(self, board: Any, watch: Watch, every_s: float) -> None:
        self._board, self._watch, self._every_s = board, watch, every_s

    def refresh(self) -> None:
        try:
            standings: Any = ray.get(self._board.read.remote(), timeout=self._every_s)
        except RayError as error:
            logger.debug("the progress board did not answer: %s", error)
            return
        self._watch(standings)


def _log_changes() -> Watch:
    last: dict[str, Standing] = {}

    def log(standings: Mapping[str, Standing]) -> None:
        for line in changes(last, standings):
            logger.info("%s", line)
        last.update(standings)

    return log


def _outcomes(names: Sequence[str], reference: Any) -> list[Outcome]:
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
    return [_outcome(name, result) for name, result in zip(names, results, strict=True)]


def _outcome(name: str, result: TaskResult | LorasegError) -> Outcome:
    if isinstance(result, LorasegError):
        return _failure(name, f"{type(result).__name__}: {result}")
    logger.info("%s: %s", name, "published before" if result.skipped else "published")
    return Outcome(name, result, None)


def _failure(name: str, reason: str) -> Outcome:
    logger.error("%s: failed: %s", name, reason)
    return Outcome(name, None, reason)
