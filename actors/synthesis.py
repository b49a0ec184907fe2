"""The data factory on Ray Data: masks stream through a pool of generators and a pool of voters.

A row is a part of the work, a few masks with all their images, so that a mask's images are never
apart and voting needs no shuffle. How many drafts wait between the pools is bounded, whatever the
number of masks. The shard is written where the vote is; the driver sees what became of it, in some
hundred bytes.
"""

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
from loraseg.data.labels import LabelSpace
from loraseg.factory.config import SynthesisConfig
from loraseg.factory.draw import Draft, Draw
from loraseg.factory.equipment import look
from loraseg.factory.pinned import Facts, Pinned
from loraseg.factory.plan import Part
from loraseg.factory.work import Outcome, Vote

__all__ = ["OnRay"]

MakeDraw = Callable[[Pinned], Callable[[Part], Draft]]
MakeVote = Callable[[Pinned], Callable[[Draft], Outcome]]


class OnRay:
    """A crew on a cluster: generators and voters with their models in memory.

    A part that loses its actor or node is done anew by another, ``generators.retries`` times.
    """

    def __init__(
        self,
        generators: PoolPlacement,
        voters: PoolPlacement,
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
        shared = StoreAccess.of_driver(), start_attempts()
        drafts = through(
            rows_of(work), _Drawer, (self._draw, pinned, *shared), self._generators, len(work)
        )
        rows = through(drafts, _Voter, (self._vote, pinned, *shared), self._voters, len(work))
        yield from outcomes(rows)

    def _join(self) -> None:
        """Connect when there is work: a run that finds nothing to do needs no cluster."""
        join(self._generators, self._voters)


class _Drawer(PoolWorker):
    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        drafts = [self._draft(pickle.loads(part)) for part in batch["work"]]
        return {"work": [pickle.dumps(draft) for draft in drafts]}

    def _draft(self, part: Part) -> Draft:
        error = self.lost_too_often(f"draw {part.id}", f"drawing: {_told(part)}")
        return Draft(part, error=error) if error else self.work(part)


class _Voter(PoolWorker):
    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        done = [self._outcome(pickle.loads(draft)) for draft in batch["work"]]
        return {"work": [pickle.dumps(outcome) for outcome in done]}

    def _outcome(self, draft: Draft) -> Outcome:
        part = draft.part
        error = self.lost_too_often(f"vote {part.id}", f"voting: {_told(part)}")
        return Outcome(part.id, error=error) if error else self.work(draft)


def _told(part: Part) -> str:
    return f"masks {part.entries[0].mask.name!r} to {part.entries[-1].mask.name!r}"
