"""The data factory on Ray Data: masks stream through a pool of generators and a pool of voters.

A row is a part of the work, a few masks with all their images, so that a mask's images are never
apart and voting needs no shuffle. How many drafts wait between the pools is bounded, whatever the
number of masks. The shard is written where the vote is; the driver sees what became of it, in some
hundred bytes.
"""

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
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.filter_stage import FilterStage, MaskUnitResult
from loraseg.batch.synthesize.generate_stage import GeneratedUnit, GenerateStage
from loraseg.batch.synthesize.models import resolve_models
from loraseg.batch.synthesize.plan import MaskWorkUnit
from loraseg.batch.synthesize.state import ResolvedSynthesisModels, SynthesisRunState
from loraseg.data.labels import LabelSpace

__all__ = ["RaySynthesisExecutor"]

GenerateStageFactory = Callable[[SynthesisRunState], Callable[[MaskWorkUnit], GeneratedUnit]]
FilterStageFactory = Callable[[SynthesisRunState], Callable[[GeneratedUnit], MaskUnitResult]]


class RaySynthesisExecutor:
    """A crew on a cluster: generators and voters with their models in memory.

    A part that loses its actor or node is done anew by another, ``generators.retries`` times.
    """

    def __init__(
        self,
        generators: ActorPoolConfig,
        voters: ActorPoolConfig,
        *,
        make_generate_stage: GenerateStageFactory = GenerateStage,
        make_filter_stage: FilterStageFactory = FilterStage,
    ) -> None:
        """Take what each actor gets, and what makes those that do the two stages."""
        self._generators, self._voters = generators, voters
        self._make_generate_stage, self._make_filter_stage = make_generate_stage, make_filter_stage
        self.threads = generators.threads
        self.device = "gpu" if generators.gpus else "cpu"

    def resolve_models(
        self, config: SynthesisConfig, label_space: LabelSpace
    ) -> ResolvedSynthesisModels:
        """Load what a config names on a worker: the driver's node may not hold it."""
        self._connect()
        call = ("look at the models", (config, label_space))
        ((_, reference),) = run_ray_tasks(resolve_models, [call], self._generators)
        return get_result(reference, "loading the models")

    def run(
        self, state: SynthesisRunState, units: Sequence[MaskWorkUnit]
    ) -> Generator[MaskUnitResult, None, None]:
        """Do all parts, yielding each as it ends."""
        self._connect()
        shared = StorageCredentials.from_environment(), start_attempt_counter()
        drafts = map_with_actor_pool(
            to_dataset(units),
            _GenerateActor,
            (self._make_generate_stage, state, *shared),
            self._generators,
            len(units),
        )
        rows = map_with_actor_pool(
            drafts,
            _FilterActor,
            (self._make_filter_stage, state, *shared),
            self._voters,
            len(units),
        )
        yield from iter_results(rows)

    def _connect(self) -> None:
        """Connect when there is work: a run that finds nothing to do needs no cluster."""
        connect_and_check_capacity(self._generators, self._voters)


class _GenerateActor(StageActor):
    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        drafts = [self._generate(pickle.loads(part)) for part in batch["work"]]
        return {"work": [pickle.dumps(draft) for draft in drafts]}

    def _generate(self, unit: MaskWorkUnit) -> GeneratedUnit:
        error = self.retries_exhausted(f"draw {unit.id}", f"drawing: {_describe(unit)}")
        return GeneratedUnit(unit, error=error) if error else self.stage(unit)


class _FilterActor(StageActor):
    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        done = [self._filter(pickle.loads(draft)) for draft in batch["work"]]
        return {"work": [pickle.dumps(outcome) for outcome in done]}

    def _filter(self, generated: GeneratedUnit) -> MaskUnitResult:
        part = generated.unit
        error = self.retries_exhausted(f"vote {part.id}", f"voting: {_describe(part)}")
        return MaskUnitResult(part.id, error=error) if error else self.stage(generated)


def _describe(unit: MaskWorkUnit) -> str:
    return f"masks {unit.masks[0].ref.name!r} to {unit.masks[-1].ref.name!r}"
