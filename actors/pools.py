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

from actors.resources import Placement, StoreAccess, connect, require_room, require_room_together
from loraseg.errors import ConfigError, StageError

__all__ = [
    "Attempts",
    "PoolPlacement",
    "PoolWorker",
    "join",
    "outcomes",
    "rows_of",
    "start_attempts",
    "through",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolPlacement(Placement):
    """What one actor of a pool takes, and how many there are.

    Attributes:
        min_parallel: Actors to ask for at the start, which an autoscaler then brings at once; the
            pool grows from there to ``max_parallel`` while work waits.
    """

    min_parallel: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        # Without arguments, super() does not know a class that slots=True has made anew.
        super(PoolPlacement, self).__post_init__()
        if self.min_parallel < 1:
            raise ConfigError(f"resources: min_parallel must be >= 1, got {self.min_parallel}")
        if self.max_parallel is not None and self.max_parallel < self.min_parallel:
            raise ConfigError(
                f"resources: expected min_parallel <= max_parallel, got {self.min_parallel} and "
                f"{self.max_parallel}"
            )


def join(*placements: PoolPlacement) -> None:
    """Connect to Ray and see whether there is room for the first actors of all pools together.

    Raises:
        ConfigError: There is none.
    """
    started_here = connect()
    for placement in placements:
        require_room(placement, may_grow=not started_here)
    require_room_together(
        [(placement, placement.min_parallel) for placement in placements],
        may_grow=not started_here,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False  # the runs tell their own


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


class PoolWorker:
    """One actor of a pool: takes over the driver's settings and makes what does the work.

    A subclass has ``__call__``, from a batch of pickled work to a batch of pickled results.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        job: Any,
        access: StoreAccess,
        placement: Placement,
        attempts: Any,
    ) -> None:
        """Make the one that does the work.

        Args:
            make: Called with ``job``, returns it.
            job: What all parts have in common.
            access: The driver's.
            placement: Of this actor.
            attempts: From :func:`start_attempts`.
        """
        access.apply()
        torch.set_num_threads(placement.threads)
        self.work = make(job)
        self._attempts, self._retries = attempts, placement.retries

    def lost_too_often(self, name: str, told: str) -> StageError | None:
        """Count an attempt; return why it is not to be made, if too many were lost.

        Args:
            name: Of the piece of work, in the count.
            told: What it is, for people.
        """
        begun: Any = ray.get(self._attempts.begin.remote(name))
        lost = begun - 1
        return StageError(f"{told} have lost {lost} workers") if lost > self._retries else None


def rows_of(work: Sequence[Any]) -> Any:
    """Return a dataset of pickled pieces of work, a block each.

    Ray joins small blocks, and one actor would do the work of all.
    """
    rows = [{"work": pickle.dumps(piece)} for piece in work]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def through(
    rows: Any,
    worker: type[PoolWorker],
    arguments: tuple[Any, ...],
    placement: PoolPlacement,
    most: int,
) -> Any:
    """Send rows through a pool of actors, as many as the placement allows and there is room for.

    Args:
        rows: From :func:`rows_of` or another pool.
        worker: Its ``make``, ``job``, ``access`` and ``attempts`` are the arguments, in the order
            (make, job, access, attempts).
        arguments: See there.
        placement: What each actor takes.
        most: Pieces of work, and so actors at the most.
    """
    make, job, access, attempts = arguments
    return rows.map_batches(
        worker,
        fn_constructor_args=(make, job, access, placement, attempts),
        batch_size=1,
        num_cpus=placement.cpus,
        num_gpus=placement.gpus or None,
        resources=placement.custom or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(placement.min_parallel, most),
            max_size=min(placement.max_parallel or most, most),
            max_tasks_in_flight_per_actor=2,
        ),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(placement.threads)}},
    )


def outcomes(rows: Any) -> Generator[Any, None, None]:
    """Yield what came through the last pool, as it comes.

    Raises:
        StageError: The workers were lost for good.
    """
    try:
        for row in rows.iter_rows():
            yield pickle.loads(row["work"])
    except RayError as error:
        raise StageError(f"the workers were lost for good: {error}") from error
