"""Segment many images with Ray Data: parts of the listing go through a pool of actors."""

import pickle
from collections.abc import Callable, Generator, Sequence
from typing import Any

from actors.pools import (
    PoolPlacement,
    PoolWorker,
    join,
    outcomes,
    rows_of,
    start_attempts,
    through,
)
from actors.resources import StoreAccess
from actors.units import result_of, run_units
from loraseg.bulk.config import BulkConfig
from loraseg.bulk.pinned import Facts, Pinned
from loraseg.bulk.plan import Part
from loraseg.bulk.work import Outcome, PartSegmenter, look

__all__ = ["OnRay"]

Make = Callable[[Pinned], Callable[[Part], Outcome]]


class OnRay:
    """A crew on a cluster: actors with the models in memory, as many as there is room.

    A part that loses its actor or node is done anew by another, ``placement.retries`` times.
    """

    def __init__(self, placement: PoolPlacement, *, make: Make = PartSegmenter) -> None:
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
        arguments = self._make, pinned, StoreAccess.of_driver(), start_attempts()
        rows = through(rows_of(work), _Worker, arguments, self._placement, len(work))
        yield from outcomes(rows)

    def _join(self) -> None:
        """Connect when there is work: a run that finds nothing to do needs no cluster."""
        join(self._placement)


class _Worker(PoolWorker):
    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        done = [self._outcome(pickle.loads(part)) for part in batch["work"]]
        return {"work": [pickle.dumps(outcome) for outcome in done]}

    def _outcome(self, part: Part) -> Outcome:
        told = f"images {part.items[0].key!r} to {part.items[-1].key!r}"
        error = self.lost_too_often(part.file, told)
        return Outcome(part, error) if error else self.work(part)
