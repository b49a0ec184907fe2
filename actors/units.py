"""Independent units of work on Ray: a bounded window of tasks, handled as they end."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from actors.resources import Placement, StoreAccess
from loraseg.errors import StageError

__all__ = ["result_of", "run_units"]


def run_units(
    function: Callable[..., Any],
    calls: Sequence[tuple[str, tuple[Any, ...]]],
    placement: Placement,
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
        placement: What each unit takes and how many run at once. What the cluster has no room for
            yet waits in Ray's queue, where the autoscaler sees it.
        tick: Called whenever a unit ended or ``tick_s`` seconds passed.
        tick_s: Longest time between two ticks; None to tick only when a unit ends.
    """
    unit, access = _unit(placement), StoreAccess.of_driver()
    waiting, running = deque(enumerate(calls)), dict[Any, int]()
    try:
        while waiting or running:
            while waiting and len(running) < (placement.max_parallel or len(calls)):
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


def result_of(reference: Any, doing: str) -> Any:
    """Return what a unit returned.

    Args:
        reference: From :func:`run_units`.
        doing: What the unit does, for the error when it is lost.

    Raises:
        StageError: Its worker was lost too often.
        LorasegError: What the unit raised.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise StageError(f"{doing}: the worker was lost for good: {error}") from error


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


def _run_unit(function: Callable[..., Any], arguments: tuple[Any, ...], access: StoreAccess) -> Any:
    """Run in the worker: take over the driver's settings, then do the work."""
    access.apply()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return function(*arguments)
