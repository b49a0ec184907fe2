"""How often pieces of work were begun: Ray Data itself repeats what is lost for ever."""

from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

__all__ = ["Attempts", "start_attempts"]


class Attempts:
    """Counts how often each piece of work was begun."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        """Return the how-manieth attempt at it begins."""
        self._begun[name] += 1
        return self._begun[name]


def start_attempts() -> Any:
    """Start the counting actor."""
    # On the driver's own node: a node that is lost without the driver must not take the count.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Attempts)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()
