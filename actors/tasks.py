"""Independent Ray tasks: a bounded number runs at once, results are handled as they complete."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from actors.resources import ResourceConfig, StorageCredentials
from loraseg.errors import StageError

__all__ = ["call_on_ray", "get_result", "ordered_map", "run_ray_tasks"]

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def run_ray_tasks(
    function: Callable[..., Any],
    calls: Sequence[tuple[str, tuple[Any, ...]]],
    resources: ResourceConfig,
    *,
    tick: Callable[[], None] | None = None,
    tick_s: float | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run ``function`` once per call and yield (index of the call, reference) as they complete.

    A task that loses its worker or node is started again, ``resources.retries`` times, so it must
    be safe to run twice. An error that the function raises is deterministic and is not retried:
    ``ray.get(reference)`` raises it. Closing the iterator cancels the tasks that are running.

    Args:
        function: A function of an importable module; workers import it by name.
        calls: Title for Ray's dashboard, and the arguments.
        resources: What each task takes and how many run at once. A task that the cluster has no
            room for waits in Ray's queue, where the autoscaler sees it.
        tick: Called whenever a task completes or ``tick_s`` seconds have passed.
        tick_s: Longest time between two ticks; None to tick only when a task completes.
    """
    task, access = _remote_function(resources), StorageCredentials.from_environment()
    pending, running = deque(enumerate(calls)), dict[Any, int]()
    try:
        while pending or running:
            while pending and len(running) < (resources.max_parallel or len(calls)):
                index, (title, arguments) = pending.popleft()
                running[task.options(name=title).remote(function, arguments, access)] = index
            completed, _ = ray.wait(list(running), timeout=tick_s)
            if tick is not None:
                tick()
            for reference in completed:
                yield running.pop(reference), reference
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def get_result(reference: Any, title: str) -> Any:
    """Return the return value of a task.

    Args:
        reference: From :func:`run_ray_tasks`.
        title: Of the task, for the error message.

    Raises:
        StageError: Its worker was lost too often.
        LorasegError: As raised by the task.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # The wrapper holds the worker's traceback; its cause is the error that was raised.
        raise error.cause from error
    except RayError as error:
        raise StageError(f"{title}: its worker was lost too often: {error}") from error


def call_on_ray(
    function: Callable[..., ResultT], *arguments: Any, title: str, resources: ResourceConfig
) -> ResultT:
    """Call a function in one Ray task and return its result.

    Args:
        function: As for :func:`run_ray_tasks`.
        arguments: Of the function.
        title: For Ray's dashboard and error messages.
        resources: What the task takes.

    Raises:
        StageError: Its worker was lost too often.
        LorasegError: As raised by the function.
    """
    ((_, reference),) = run_ray_tasks(function, [(title, arguments)], resources)
    return get_result(reference, title)


def ordered_map(
    resources: ResourceConfig, title: str
) -> Callable[[Callable[[ItemT], ResultT], Sequence[ItemT]], Iterator[ResultT]]:
    """Return a ``map`` that calls the function in one Ray task per item.

    The results come in the order of the items, after all tasks have completed. The first error
    ends the map.

    Args:
        resources: What each task takes, how many run at once, and how many lost workers are
            replaced.
        title: For Ray's dashboard and error messages, followed by the index of the item.
    """

    def run(function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        calls = [(f"{title} {index}", (item,)) for index, item in enumerate(items)]
        results: dict[int, ResultT] = {}
        for index, reference in run_ray_tasks(function, calls, resources):
            results[index] = get_result(reference, calls[index][0])
        return (results[index] for index in range(len(items)))

    return run


def _remote_function(resources: ResourceConfig) -> Any:
    declare: Any = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        resources=resources.custom_resources,
        max_retries=resources.retries,
        retry_exceptions=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(resources.threads)}},
    )
    return declare(_run_task)


def _run_task(
    function: Callable[..., Any], arguments: tuple[Any, ...], access: StorageCredentials
) -> Any:
    """Apply the driver's settings in the worker and call the function."""
    access.export()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return function(*arguments)
