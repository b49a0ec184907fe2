"""Score several domains at once on Ray."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.resources import Placement
from actors.units import run_units
from loraseg.errors import StageError
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
        calls = [(f"evaluate {work.domain.name}", (work,)) for work in works]
        results: dict[int, Any] = {}
        for index, reference in run_units(function, calls, placement):
            results[index] = _result(reference)
        return (results[index] for index in range(len(works)))

    return spread


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # The wrapper carries the worker's whole traceback; its cause says what went wrong.
        raise error.cause from error
    except RayError as error:
        raise StageError(f"a piece of the evaluation was lost for good: {error}") from error
