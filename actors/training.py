"""Train many adapters at once, each as one plain Ray task.

Why tasks and not Ray Train: a ``TorchTrainer`` run starts a controller and a worker group, which
costs 15 s and more before the first step, and an error in one worker restarts the whole group. An
adapter is small, fits one worker and takes minutes, so a task costs about a second and keeps
failures apart. ``TorchTrainer`` with DDP is for one large model and comes with the segmenter
trainer.

A task that loses its worker or node is started again by Ray and resumes by itself from the last
checkpoint in the store. An error that the task raises would come again, so it is never retried:
that adapter fails alone.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.resources import Placement, StoreAccess
from loraseg.errors import LorasegError
from loraseg.train.board import ProgressBoard, Standing, changes
from loraseg.train.tasks import AdapterTask, Progress, TaskResult, run_task

__all__ = ["Outcome", "train_adapters"]

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.5
_READ_EVERY_S = 3.0

Run = Callable[[AdapterTask, Callable[[Progress], None]], TaskResult]
Watch = Callable[[Mapping[str, Standing]], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one adapter ended: with a result, or with the reason of its failure."""

    name: str
    result: TaskResult | None
    error: str | None


def train_adapters(
    tasks: Sequence[AdapterTask],
    placement: Placement,
    *,
    run: Run = run_task,
    watch: Watch | None = None,
    read_every_s: float = _READ_EVERY_S,
) -> Iterator[Outcome]:
    """Run all tasks on the connected Ray cluster and yield each as it ends, in order of arrival.

    Leaving the iterator early stops what is still running.

    Args:
        tasks: Units of work; what does not fit the cluster yet waits in Ray's queue.
        placement: What each takes, how many at once, how many lost workers are made up for.
        run: The unit of work; safe to start again after a kill at any point.
        watch: Called with the board at most every ``read_every_s`` seconds; by default each change
            is logged in one line.
        read_every_s: Seconds between two readings.
    """
    unit = _unit(placement)
    board = _start_board()
    access = StoreAccess.of_driver()
    view = _View(board, watch or _log_changes(), read_every_s)
    waiting, running = deque(tasks), dict[Any, AdapterTask]()
    try:
        while waiting or running:
            while waiting and len(running) < (placement.max_parallel or len(tasks)):
                task = waiting.popleft()
                name = f"train {task.name}"
                running[unit.options(name=name).remote(run, task, board, access)] = task
            done, _ = ray.wait(list(running), timeout=read_every_s)
            view.refresh(force=bool(done))
            for reference in done:
                yield _outcome(running.pop(reference).name, reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _unit(placement: Placement) -> Any:
    declare: Any = ray.remote(
        num_cpus=placement.cpus,
        num_gpus=placement.gpus,
        resources=placement.custom,
        max_retries=placement.retries,
        retry_exceptions=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(placement.threads)}},
    )
    return declare(_run_unit)


def _start_board() -> Any:
    # On the driver's own node: a node that is lost without the driver must not take the board.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(ProgressBoard)
        .options(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
        .remote()
    )


def _run_unit(run: Run, task: AdapterTask, board: Any, access: StoreAccess) -> TaskResult:
    """Run in the worker: take over the driver's settings, then do the work."""
    access.apply()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return run(task, _Reporter(board))


class _Reporter:
    """Sends progress to the board without waiting for it, a few times a second at most."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._worker = f"{ray.get_runtime_context().get_node_id()}:{os.getpid()}"
        self._phase = ""
        self._sent_at = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase == self._phase and now - self._sent_at < _REPORT_EVERY_S:
            return
        self._phase, self._sent_at = progress.phase, now
        self._board.put.remote(progress, self._worker)


class _View:
    """Reads the board now and then; a board that does not answer holds up nothing."""

    def __init__(self, board: Any, watch: Watch, every_s: float) -> None:
        self._board, self._watch, self._every_s = board, watch, every_s
        self._read_at = time.monotonic()

    def refresh(self, *, force: bool) -> None:
        if not force and time.monotonic() - self._read_at < self._every_s:
            return
        self._read_at = time.monotonic()
        try:
            standings = ray.get(self._board.read.remote(), timeout=self._every_s)
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


def _outcome(name: str, reference: Any) -> Outcome:
    try:
        return Outcome(name, ray.get(reference), None)
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, LorasegError):
            logger.error("%s: unexpected error in its worker:\n%s", name, error)
        return Outcome(name, None, f"{type(cause).__name__}: {cause}")
    except RayError as error:
        return Outcome(name, None, f"{type(error).__name__}: lost by the cluster: {error}")
