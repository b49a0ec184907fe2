"""The data factory on Ray Data: masks stream through a pool of generators and a pool of voters.

A row is a part of the work, a few masks with all their images, so that a mask's images are never
apart and voting needs no shuffle. How many drafts wait between the pools is bounded, whatever the
number of masks. The shard is written where the vote is; the driver sees what became of it, in some
hundred bytes.
"""

import pickle
from collections.abc import Callable, Generator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from actors.attempts import start_attempts
from actors.resources import Placement, StoreAccess, connect, require_room
from actors.units import result_of, run_units
from loraseg.data.labels import LabelSpace
from loraseg.errors import StageError
from loraseg.factory.config import SynthesisConfig
from loraseg.factory.equipment import look
from loraseg.factory.pinned import Facts, Pinned
from loraseg.factory.plan import Part
from loraseg.factory.work import Draft, Draw, Outcome, Vote

__all__ = ["OnRay"]

MakeDraw = Callable[[Pinned], Callable[[Part], Draft]]
MakeVote = Callable[[Pinned], Callable[[Draft], Outcome]]


class OnRay:
    """A crew on a cluster: generators and voters with their models in memory.

    A part that loses its actor or node is done anew by another, ``generators.retries`` times.
    """

    def __init__(
        self,
        generators: Placement,
        voters: Placement,
        *,
        draw: MakeDraw = Draw,
        vote: MakeVote = Vote,
    ) -> None:
        """Take what each actor gets, and what makes those that do the two stages."""
        self._generators, self._voters = generators, voters
        self._draw, self._vote = draw, vote
        self.threads = generators.threads
        self.device = "gpu" if generators.gpus else "cpu"

    def look(self, config: SynthesisConfig, label_space: LabelSpace) -> Facts:
        """Load what a config names on a worker: the driver's node may not hold it."""
        self._join()
        call = ("look at the models", (config, label_space))
        ((_, reference),) = run_units(look, [call], self._generators)
        return result_of(reference, "loading the models")

    def make(self, pinned: Pinned, work: Sequence[Part]) -> Generator[Outcome, None, None]:
        """Do all parts, yielding each as it ends."""
        self._join()
        # A block each: Ray joins small ones, and one actor would do the work of all.
        rows = ray.data.from_items(
            [{"part": pickle.dumps(part)} for part in work], override_num_blocks=len(work)
        )
        attempts, access = start_attempts(), StoreAccess.of_driver()
        drafts = _pool(
            rows, _Drawer, (self._draw, pinned, access, self._generators, attempts), len(work)
        )
        outcomes = _pool(
            drafts, _Voter, (self._vote, pinned, access, self._voters, attempts), len(work)
        )
        try:
            for row in outcomes.iter_rows():
                yield pickle.loads(row["outcome"])
        except RayError as error:
            raise StageError(f"the workers were lost for good: {error}") from error

    def _join(self) -> None:
        """Connect when there is work: a run that finds nothing to do needs no cluster."""
        started_here = connect()
        for placement in (self._generators, self._voters):
            require_room(placement, may_grow=not started_here)
        ray.data.DataContext.get_current().enable_progress_bars = False  # the run tells its own


def _pool(rows: Any, worker: Any, arguments: tuple[Any, ...], parts: int) -> Any:
    """Send rows through actors, as many as the placement allows and there is room for."""
    placement: Placement = arguments[3]
    return rows.map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_size=1,
        num_cpus=placement.cpus,
        num_gpus=placement.gpus or None,
        resources=placement.custom or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=min(placement.max_parallel or parts, parts),
            max_tasks_in_flight_per_actor=2,
        ),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(placement.threads)}},
    )


class _Worker:
    """One actor of either pool: takes over the driver's settings, makes its stage."""

    def __init__(
        self,
        make: Callable[[Pinned], Any],
        pinned: Pinned,
        access: StoreAccess,
        placement: Placement,
        attempts: Any,
    ) -> None:
        access.apply()
        torch.set_num_threads(placement.threads)
        self._stage = make(pinned)
        self._attempts, self._retries = attempts, placement.retries

    def lost(self, stage: str, part: Part) -> StageError | None:
        """Count an attempt; return why it is not to be made."""
        begun: Any = ray.get(self._attempts.begin.remote(f"{stage} {part.id}"))
        if begun - 1 <= self._retries:
            return None
        first, last = part.entries[0].mask.name, part.entries[-1].mask.name
        return StageError(f"masks {first!r} to {last!r} have lost {begun - 1} workers ({stage})")


class _Drawer(_Worker):
    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        drafts = [self._draft(pickle.loads(part)) for part in batch["part"]]
        return {"draft": [pickle.dumps(draft) for draft in drafts]}

    def _draft(self, part: Part) -> Draft:
        error = self.lost("draw", part)
        return Draft(part, error=error) if error else self._stage(part)


class _Voter(_Worker):
    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        outcomes = [self._outcome(pickle.loads(draft)) for draft in batch["draft"]]
        return {"outcome": [pickle.dumps(outcome) for outcome in outcomes]}

    def _outcome(self, draft: Draft) -> Outcome:
        error = self.lost("vote", draft.part)
        return Outcome(draft.part.id, error=error) if error else self._stage(draft)
