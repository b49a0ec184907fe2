"""Independent units of work on Ray: a bounded window of tasks, handled as they end."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from actors.resources import ResourceConfig, StorageCredentials
from loraseg.errors import StageError

__all__ = ["get_result", "run_ray_tasks"]


def run_ray_tasks(
    function: Callable[..., Any],
    calls: Sequence[tuple[str, tuple[Any, ...]]],
    resources: ResourceConfig,
    *,
    tick: Callable[[], None] | None = None,
    tick_s: float | None = None,
) -> Iterator[tuple[int, Any]]:
    """Run ``function`` once for each call and yield (index of the call, reference) as they end.

    A unit that loses its worker or node is started again, ``placement.retries`` times, so it must
    be safe to run twice. An error that it raises would come again and is never retried: it comes
    out of ``ray.get(reference)``. Leaving the iterator early stops what is still running.

    Args:
        function: A function of an importable module; workers import it by name.
        calls: The title that Ray shows and the arguments.
        resources: What each unit takes and how many run at once. What the cluster has no room for
            yet waits in Ray's queue, where the autoscaler sees it.
        tick: Called whenever a unit ended or ``tick_s`` seconds passed.
        tick_s: Longest time between two ticks; None to tick only when a unit ends.
    """
    unit, access = _remote_function(resources), StorageCredentials.from_environment()
    waiting, running = deque(enumerate(calls)), dict[Any, int]()
    try:
        while waiting or running:
            while waiting and len(running) < (resources.max_parallel or len(calls)):
                index, (title, arguments) = waiting.popleft()
                running[unit.options(name=title).remote(function, arguments, access)] = index
            done, _ = ray.wait(list(running), timeout=tick_s)
            if tick is not None:
                tick()
            for reference in done:
                yield running.pop(reference), reference
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def get_result(reference: Any, description: str) -> Any:
    """Return what a unit returned.

    Args:
        reference: From :func:`run_units`.
        description: What the unit does, for the error when it is lost.

    Raises:
        StageError: Its worker was lost too often.
        LorasegError: What the unit raised.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise StageError(f"{description}: the worker was lost for good: {error}") from error


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
    """Run in the worker: take over the driver's settings, then do the work."""
    access.export()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return function(*arguments)
