"""Segment many images with Ray Data: parts of the listing go through a pool of actors."""

import pickle
from collections.abc import Callable, Generator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from actors.attempts import start_attempts
from actors.resources import Placement, StoreAccess, connect, require_room
from actors.units import result_of, run_units
from loraseg.bulk.config import BulkConfig
from loraseg.bulk.pinned import Facts, Pinned
from loraseg.bulk.plan import Part
from loraseg.bulk.work import Outcome, PartSegmenter, look
from loraseg.errors import StageError

__all__ = ["OnRay"]

Make = Callable[[Pinned], Callable[[Part], Outcome]]


class OnRay:
    """A crew on a cluster: actors with the models in memory, as many as there is room.

    A part that loses its actor or node is done anew by another, ``placement.retries`` times.
    """

    def __init__(self, placement: Placement, *, make: Make = PartSegmenter) -> None:
        """Take what each actor gets, and what makes the one that does its parts."""
        self._placement = placement
        self._make = make
        self.threads = placement.threads
        self.device = "gpu" if placement.gpus else "cpu"

    def look(self, config: BulkConfig) -> Facts:
        """Load what a config names on a worker: the driver's node may not hold it."""
        self._join()
        ((_, reference),) = run_units(look, [("look at the models", (config,))], self._placement)
        return result_of(reference, "loading the models")

    def segment(self, pinned: Pinned, work: Sequence[Part]) -> Generator[Outcome, None, None]:
        """Do all parts, yielding each as it ends."""
        self._join()
        placement = self._placement
        # A block each: Ray joins small ones, and one actor would do the work of all.
        rows = ray.data.from_items(
            [{"part": pickle.dumps(part)} for part in work], override_num_blocks=len(work)
        )
        most = min(placement.max_parallel or len(work), len(work))
        access = StoreAccess.of_driver()
        outcomes = rows.map_batches(
            _Worker,
            fn_constructor_args=(self._make, pinned, access, placement, start_attempts()),
            batch_size=1,
            num_cpus=placement.cpus,
            num_gpus=placement.gpus or None,
            resources=placement.custom or None,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=most, max_tasks_in_flight_per_actor=2
            ),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(placement.threads)}},
        )
        try:
            for row in outcomes.iter_rows():
                yield pickle.loads(row["outcome"])
        except RayError as error:
            raise StageError(f"the workers were lost for good: {error}") from error

    def _join(self) -> None:
        """Connect when there is work: a run that finds nothing to do needs no cluster."""
        require_room(self._placement, may_grow=not connect())
        ray.data.DataContext.get_current().enable_progress_bars = False  # the run tells its own


class _Worker:
    """One actor: takes over the driver's settings, then does parts."""

    def __init__(
        self, make: Make, pinned: Pinned, access: StoreAccess, placement: Placement, attempts: Any
    ) -> None:
        access.apply()
        torch.set_num_threads(placement.threads)
        self._segment = make(pinned)
        self._attempts, self._retries = attempts, placement.retries

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        outcomes = [self._outcome(pickle.loads(part)) for part in batch["part"]]
        return {"outcome": [pickle.dumps(outcome) for outcome in outcomes]}

    def _outcome(self, part: Part) -> Outcome:
        begun: Any = ray.get(self._attempts.begin.remote(part.file))
        lost = begun - 1
        if lost > self._retries:
            first, last = part.items[0].key, part.items[-1].key
            reason = f"images {first!r} to {last!r} have lost {lost} workers"
            return Outcome(part, StageError(reason))
        return self._segment(part)
