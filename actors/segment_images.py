"""Segment many images with Ray Data: parts of the listing go through a pool of actors."""

import pickle
from collections.abc import Callable, Generator, Sequence
from typing import Any

from actors.actor_pools import (
    ActorPoolConfig,
    StageActor,
    connect_and_check_capacity,
    iter_results,
    map_with_actor_pool,
    start_attempt_counter,
    to_dataset,
)
from actors.resources import StorageCredentials
from actors.tasks import get_result, run_ray_tasks
from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.batch.segment_images.plan import ImageWorkUnit
from loraseg.batch.segment_images.stage import ImageUnitResult, SegmentImagesStage, resolve_models
from loraseg.batch.segment_images.state import ResolvedSegmentationModels, SegmentationRunState

__all__ = ["RaySegmentationExecutor"]

StageFactory = Callable[[SegmentationRunState], Callable[[ImageWorkUnit], ImageUnitResult]]


class RaySegmentationExecutor:
    """A crew on a cluster: actors with the models in memory, as many as there is room.

    A part that loses its actor or node is done anew by another, ``placement.retries`` times.
    """

    def __init__(
        self, pool: ActorPoolConfig, *, make_stage: StageFactory = SegmentImagesStage
    ) -> None:
        """Take what each actor gets, and what makes the one that does its parts."""
        self._pool = pool
        self._make_stage = make_stage
        self.threads = pool.threads
        self.device = "gpu" if pool.gpus else "cpu"

    def resolve_models(self, config: SegmentImagesConfig) -> ResolvedSegmentationModels:
        """Load what a config names on a worker: the driver's node may not hold it."""
        self._connect()
        ((_, reference),) = run_ray_tasks(
            resolve_models, [("look at the models", (config,))], self._pool
        )
        return get_result(reference, "loading the models")

    def run(
        self, state: SegmentationRunState, units: Sequence[ImageWorkUnit]
    ) -> Generator[ImageUnitResult, None, None]:
        """Do all parts, yielding each as it ends."""
        self._connect()
        arguments = (
            self._make_stage,
            state,
            StorageCredentials.from_environment(),
            start_attempt_counter(),
        )
        rows = map_with_actor_pool(
            to_dataset(units), _SegmentActor, arguments, self._pool, len(units)
        )
        yield from iter_results(rows)

    def _connect(self) -> None:
        """Connect when there is work: a run that finds nothing to do needs no cluster."""
        connect_and_check_capacity(self._pool)


class _SegmentActor(StageActor):
    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        done = [self._segment(pickle.loads(part)) for part in batch["work"]]
        return {"work": [pickle.dumps(outcome) for outcome in done]}

    def _segment(self, unit: ImageWorkUnit) -> ImageUnitResult:
        told = f"images {unit.items[0].key!r} to {unit.items[-1].key!r}"
        error = self.retries_exhausted(unit.file, told)
        return ImageUnitResult(unit, error) if error else self.stage(unit)
