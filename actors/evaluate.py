"""Score several domains at once on Ray."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.resources import ResourceConfig
from actors.tasks import run_ray_tasks
from loraseg.errors import StageError
from loraseg.evaluate.run import EvaluationTask, OrderedMap

__all__ = ["ordered_map"]


def ordered_map(resources: ResourceConfig) -> OrderedMap:
    """Return a ``map`` that runs each piece of work as one Ray task.

    Results come in the order of the work. Work is safe to run twice, so Ray repeats what a lost
    worker or node had in hand; an error of the work itself would come again and ends the map.

    Args:
        resources: What each takes, how many at once, how many lost workers are made up for.
    """

    def spread(
        function: Callable[[EvaluationTask], Any], works: Sequence[EvaluationTask]
    ) -> Iterator[Any]:
        calls = [(f"evaluate {work.domain.name}", (work,)) for work in works]
        results: dict[int, Any] = {}
        for index, reference in run_ray_tasks(function, calls, resources):
            results[index] = _get_result(reference)
        return (results[index] for index in range(len(works)))

    return spread


def _get_result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # The wrapper carries the worker's whole traceback; its cause says what went wrong.
        raise error.cause from error
    except RayError as error:
        raise StageError(f"a piece of the evaluation was lost for good: {error}") from error
