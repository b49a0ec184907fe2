"""The executor on Ray: work units pass through one pool of actors per stage (Ray Data).

Actors keep their models in memory. Ray Data bounds how many results wait between two pools, and
the driver receives the last stage's values only. Ray Data retries a unit without limit when its
actor or node is lost, so an actor on the driver's node counts the attempts.
"""

import pickle
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import ray
import torch
from ray.exceptions import RayError

from actors.resources import (
    ResourceConfig,
    StorageCredentials,
    check_total_capacity,
    connect_with_capacity,
    start_on_driver_node,
)
from actors.tasks import call_on_ray
from loraseg.batch.core.executor import Stage, UnitResult, WorkUnit
from loraseg.errors import ConfigError, StageError

__all__ = ["ActorPoolConfig", "RayExecutor"]

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorPoolConfig(ResourceConfig):
    """What each actor of a pool takes, and how many there are.

    Attributes:
        min_parallel: Actors at the start, which an autoscaler provides together; the pool grows to
            ``max_parallel`` while work waits.
    """

    min_parallel: int = 1

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A number is out of range.
        """
        ResourceConfig.__post_init__(self)
        if self.min_parallel < 1:
            raise ConfigError(f"resources: min_parallel must be >= 1, got {self.min_parallel}")
        if self.max_parallel is not None and self.max_parallel < self.min_parallel:
            raise ConfigError(
                f"resources: expected min_parallel <= max_parallel, got {self.min_parallel} and "
                f"{self.max_parallel}"
            )


class RayExecutor:
    """Runs each stage in its own pool of actors.

    A unit that loses its actor or node is sent to another one, ``retries`` times per stage.
    """

    def __init__(self, *pools: ActorPoolConfig) -> None:
        """Set the pool of each stage; the first one's threads and device count for the job.

        Ray is joined when there is work: a job with nothing to do needs no cluster.
        """
        self._pools = pools
        self.threads = pools[0].threads
        self.device: Literal["cpu", "gpu"] = "gpu" if pools[0].gpus else "cpu"

    def call(self, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Call a function on a worker of the first pool's kind: the driver may lack the models."""
        self._connect()
        return call_on_ray(function, *arguments, title=function.__name__, resources=self._pools[0])

    def run(
        self, stages: Sequence[Stage], state: Any, units: Sequence[WorkUnit]
    ) -> Generator[UnitResult, None, None]:
        """Send units through the pools and yield their results as they complete.

        Raises:
            ConfigError: The cluster has no room for the first actors of all pools.
            StageError: Workers were lost too often.
        """
        self._connect()
        shared = StorageCredentials.from_environment(), start_on_driver_node(_AttemptCounter)
        rows = _to_rows([UnitResult.start(unit) for unit in units])
        for stage, pool in zip(stages, self._pools, strict=True):
            rows = rows.map_batches(
                _StageActor,
                fn_constructor_args=(stage, state, pool, *shared),
                batch_size=1,
                num_cpus=pool.cpus,
                num_gpus=pool.gpus or None,
                resources=pool.custom_resources or None,
                compute=_pool_strategy(pool, len(units)),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(pool.threads)}},
            )
        try:
            for row in rows.iter_rows():
                yield pickle.loads(row["result"])
        except RayError as error:
            raise StageError(f"workers were lost too often: {error}") from error

    def _connect(self) -> None:
        may_grow = connect_with_capacity(*self._pools)
        check_total_capacity([(pool, pool.min_parallel) for pool in self._pools], may_grow=may_grow)
        # The jobs log their own progress.
        ray.data.DataContext.get_current().enable_progress_bars = False


class _AttemptCounter:
    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def increment(self, name: str) -> int:
        """Record a new attempt at ``name`` and return its number, starting at 1."""
        self._counts[name] += 1
        return self._counts[name]


class _StageActor:
    """An actor of a pool; maps a batch of pickled results of one stage to those of the next."""

    def __init__(
        self,
        stage: Stage,
        state: Any,
        pool: ActorPoolConfig,
        access: StorageCredentials,
        attempts: Any,
    ) -> None:
        access.export()
        torch.set_num_threads(pool.threads)
        self._name, self._step = stage.name, stage.make(state)
        self._retries, self._attempts = pool.retries, attempts

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self._run(pickle.loads(row))) for row in batch["result"]]}

    def _run(self, result: UnitResult) -> UnitResult:
        attempt: Any = ray.get(self._attempts.increment.remote(f"{self._name} {result.unit_id}"))
        lost = attempt - 1
        if lost > self._retries:
            message = f"{self._name}: {result.description} have lost {lost} workers"
            return result.fail(StageError(message))
        return result.apply(self._step)


def _to_rows(results: Sequence[UnitResult]) -> Any:
    """Return a Ray dataset with one block per row: one actor would process a joint block."""
    rows = [{"result": pickle.dumps(result)} for result in results]
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _pool_strategy(pool: ActorPoolConfig, units: int) -> ray.data.ActorPoolStrategy:
    return ray.data.ActorPoolStrategy(
        min_size=min(pool.min_parallel, units),
        max_size=min(pool.max_parallel or units, units),
        max_tasks_in_flight_per_actor=2,
    )
