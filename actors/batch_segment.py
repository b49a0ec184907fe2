"""Segment many images with Ray Data: parts of the listing go through a pool of actors."""

import pickle
from collections.abc import Generator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from actors.resources import Placement, StoreAccess, connect, require_room
from actors.units import run_units
from loraseg.bulk.config import BulkConfig
from loraseg.bulk.pinned import Facts, Pinned
from loraseg.bulk.plan import Part
from loraseg.bulk.work import Outcome, PartSegmenter, look
from loraseg.errors import StageError

__all__ = ["OnRay"]


class OnRay:
    """A crew on a cluster: actors with the models in memory, as many as there is room.

    A part that loses its actor or node is done anew by another, ``placement.retries`` times.
    """

    def __init__(self, placement: Placement) -> None:
        """Take what each actor gets."""
        self._placement = placement
        self.threads = placement.threads
        self.device = "gpu" if placement.gpus else "cpu"

    def look(self, config: BulkConfig) -> Facts:
        """Load what a config names on a worker: the driver's node may not hold it."""
        self._join()
        ((_, reference),) = run_units(look, [("look at the models", (config,))], self._placement)
        try:
            facts: Any = ray.get(reference)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise StageError(f"the worker that loads the models was lost: {error}") from error
        return facts

    def segment(self, pinned: Pinned, work: Sequence[Part]) -> Generator[Outcome, None, None]:
        """Do all parts, yielding each as it ends."""
        self._join()
        placement = self._placement
        # A block each: Ray joins small ones, and one actor would do the work of all.
        rows = ray.data.from_items(
            [{"part": pickle.dumps(part)} for part in work], override_num_blocks=len(work)
        )
        most = min(placement.max_parallel or len(work), len(work))
        outcomes = rows.map_batches(
            _Worker,
            fn_constructor_args=(pinned, StoreAccess.of_driver(), placement.threads),
            batch_size=1,
            num_cpus=placement.cpus,
            num_gpus=placement.gpus or None,
            resources=placement.custom,
            max_task_retries=placement.retries,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=most, max_tasks_in_flight_per_actor=2
            ),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(placement.threads)}},
        )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the run tells its own progress
        try:
            for row in outcomes.iter_rows():
                yield pickle.loads(row["outcome"])
        except RayError as error:
            raise StageError(f"a part of the images was lost for good: {error}") from error

    def _join(self) -> None:
        """Connect when there is work: a run that finds nothing to do needs no cluster."""
        if not ray.is_initialized():
            require_room(self._placement, may_grow=not connect())


class _Worker:
    """One actor: takes over the driver's settings, then does parts."""

    def __init__(self, pinned: Pinned, access: StoreAccess, threads: int) -> None:
        access.apply()
        torch.set_num_threads(threads)
        self._segment = PartSegmenter(pinned)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        outcomes = [self._segment(pickle.loads(part)) for part in batch["part"]]
        return {"outcome": [pickle.dumps(outcome) for outcome in outcomes]}
