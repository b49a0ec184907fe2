"""Pools of actors that parts of a job stream through, with their models in memory.

Ray Data itself repeats what is lost for ever, so how often each part was begun is counted here.
"""

import pickle
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.resources import (
    ResourceConfig,
    StorageCredentials,
    check_capacity,
    check_total_capacity,
    connect,
)
from loraseg.errors import ConfigError, StageError

__all__ = [
    "ActorPoolConfig",
    "AttemptCounter",
    "StageActor",
    "connect_and_check_capacity",
    "iter_results",
    "map_with_actor_pool",
    "start_attempt_counter",
    "to_dataset",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorPoolConfig(ResourceConfig):
    """What one actor of a pool takes, and how many there are.

    Attributes:
        min_parallel: Actors to ask for at the start, which an autoscaler then brings at once; the
            pool grows from there to ``max_parallel`` while work waits.
    """

    min_parallel: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        # Without arguments, super() does not know a class that slots=True has made anew.
        super(ActorPoolConfig, self).__post_init__()
        if self.min_parallel < 1:
            raise ConfigError(f"resources: min_parallel must be >= 1, got {self.min_parallel}")
        if self.max_parallel is not None and self.max_parallel < self.min_parallel:
            raise ConfigError(
                f"resources: expected min_parallel <= max_parallel, got {self.min_parallel} and "
                f"{self.max_parallel}"
            )


def connect_and_check_capacity(*pools: ActorPoolConfig) -> None:
    """Connect to Ray and see whether there is room for the first actors of all pools together.

    Raises:
        ConfigError: There is none.
    """
    started_here = connect()
    for placement in pools:
        check_capacity(placement, may_grow=not started_here)
    check_total_capacity(
        [(placement, placement.min_parallel) for placement in pools],
        may_grow=not started_here,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False  # the runs tell their own


class AttemptCounter:
    """Counts how often each piece of work was begun."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def increment(self, name: str) -> int:
        """Return the how-manieth attempt at it begins."""
        self._counts[name] += 1
        return self._counts[name]


def start_attempt_counter() -> Any:
    """Start the counting actor."""
    # On the driver's own node: a node that is lost without the driver must not take the count.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(AttemptCounter)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


class StageActor:
    """One actor of a pool: takes over the driver's settings and makes what does the work.

    A subclass has ``__call__``, from a batch of pickled work to a batch of pickled results.
    """

    def __init__(
        self,
        make_stage: Callable[[Any], Any],
        state: Any,
        access: StorageCredentials,
        resources: ResourceConfig,
        attempts: Any,
    ) -> None:
        """Make the one that does the work.

        Args:
            make_stage: Called with ``state``, returns it.
            state: What all parts have in common.
            access: The driver's.
            resources: Of this actor.
            attempts: From :func:`start_attempts`.
        """
        access.export()
        torch.set_num_threads(resources.threads)
        self.stage = make_stage(state)
        self._attempts, self._retries = attempts, resources.retries

    def retries_exhausted(self, name: str, description: str) -> StageError | None:
        """Count an attempt; return why it is not to be made, if too many were lost.

        Args:
            name: Of the piece of work, in the count.
            description: What it is, for people.
        """
        begun: Any = ray.get(self._attempts.increment.remote(name))
        lost = begun - 1
        return (
            StageError(f"{description} have lost {lost} workers") if lost > self._retries else None
        )


def to_dataset(units: Sequence[Any]) -> Any:
    """Return a dataset of pickled pieces of work, a block each.

    Ray joins small blocks, and one actor would do the work of all.
    """
    rows = [{"work": pickle.dumps(piece)} for piece in units]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def map_with_actor_pool(
    rows: Any,
    actor_class: type[StageActor],
    arguments: tuple[Any, ...],
    pool: ActorPoolConfig,
    max_actors: int,
) -> Any:
    """Send rows through a pool of actors, as many as the placement allows and there is room for.

    Args:
        rows: From :func:`rows_of` or another pool.
        actor_class: Its ``make_stage``, ``state``, ``access`` and ``attempts`` are the arguments,
            in the order (make, job, access, attempts).
        arguments: See there.
        pool: What each actor takes.
        max_actors: Pieces of work, and so actors at the most.
    """
    make, job, access, attempts = arguments
    return rows.map_batches(
        actor_class,
        fn_constructor_args=(make, job, access, pool, attempts),
        batch_size=1,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        resources=pool.custom_resources or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(pool.min_parallel, max_actors),
            max_size=min(pool.max_parallel or max_actors, max_actors),
            max_tasks_in_flight_per_actor=2,
        ),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(pool.threads)}},
    )


def iter_results(rows: Any) -> Generator[Any, None, None]:
    """Yield what came through the last pool, as it comes.

    Raises:
        StageError: The workers were lost for good.
    """
    try:
        for row in rows.iter_rows():
            yield pickle.loads(row["work"])
    except RayError as error:
        raise StageError(f"the workers were lost for good: {error}") from error
