"""Score several domains at once on Ray."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from actors.resources import Placement, StoreAccess
from loraseg.evaluate.run import Spread, Work

__all__ = ["on_ray"]


def on_ray(placement: Placement) -> Spread:
    """Return a ``map`` that runs each piece of work as one Ray task.

    Results come in the order of the work. Work is safe to run twice, so Ray repeats what a lost
    worker or node had in hand; an error of the work itself would come again and ends the map.

    Args:
        placement: What each takes, how many at once, how many lost workers are made up for.
    """

    def spread(function: Callable[[Work], Any], works: Sequence[Work]) -> Iterator[Any]:
        unit, access = _unit(placement), StoreAccess.of_driver()
        waiting, running = deque(enumerate(works)), dict[Any, int]()
        results: dict[int, Any] = {}
        try:
            while waiting or running:
                while waiting and len(running) < (placement.max_parallel or len(works)):
                    index, work = waiting.popleft()
                    name = f"evaluate {work.domain.name}"
                    running[unit.options(name=name).remote(function, work, access)] = index
                done, _ = ray.wait(list(running))
                for reference in done:
                    results[running.pop(reference)] = _result(reference)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
        return (results[index] for index in range(len(works)))

    return spread


def _unit(placement: Placement) -> Any:
    declare: Any = ray.remote(
        num_cpus=placement.cpus,
        num_gpus=placement.gpus,
        max_retries=placement.retries,
        retry_exceptions=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(placement.threads)}},
    )
    return declare(_run_unit)


def _run_unit(function: Callable[[Work], Any], work: Work, access: StoreAccess) -> Any:
    access.apply()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return function(work)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # The wrapper carries the worker's whole traceback; its cause says what went wrong.
        raise error.cause from error
