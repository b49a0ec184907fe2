"""Generate the pairs that no earlier run into the same output has generated, and commit them."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from loraseg.batch.core.executor import Executor, Stage
from loraseg.batch.core.output import publish
from loraseg.batch.core.run import Progress, run_units
from loraseg.batch.synthesize.conditions import ConditionSource
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.filter_stage import (
    UNITS_PREFIX,
    CommittedShard,
    FilterStage,
    committed_key,
    read_committed,
)
from loraseg.batch.synthesize.generate_stage import GenerateStage
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.batch.synthesize.models import resolve_models
from loraseg.batch.synthesize.plan import (
    PlanHistory,
    SynthesisWorkUnit,
    decode_plan,
    encode_plan,
    plan_units,
    scan_conditions,
)
from loraseg.batch.synthesize.report import REPORT, write_report
from loraseg.batch.synthesize.state import STATE_FORMAT, SynthesisRunState, open_run_state
from loraseg.data.shards.manifest import MANIFEST_KEY, ShardEntry, ShardManifest, read_manifest
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import ConfigError
from loraseg.storage import ObjectStore, open_store

__all__ = ["STAGES", "SynthesisSummary", "synthesize"]

logger = logging.getLogger(__name__)

STAGES = (Stage("generate", GenerateStage), Stage("filter", FilterStage))

_READ_THREADS = 16
_MAX_REJECTED = 1000


@dataclass(frozen=True, slots=True)
class SynthesisSummary:
    """Result of a completed run.

    Attributes:
        new_rows: Rows that this run added to the dataset.
        manifest: The committed manifest.
        rejected: (name, reason) of conditions without images in this run, at most 1,000.
    """

    new_rows: int
    manifest: ShardManifest
    rejected: tuple[tuple[str, str], ...]


def synthesize(config: SynthesisConfig, executor: Executor) -> SynthesisSummary:
    """Generate the pairs that no earlier run has generated, then commit them.

    Safe to kill at any point and to run again. The commit is one conditional write of the manifest;
    readers see nothing of the run before it.

    Args:
        config: Masks, models and output.
        executor: Runs the work units; with Ray, one pool each for generating and filtering.

    Raises:
        ConfigError: The output was created with other settings, or is complete and would have to
            grow without ``append``.
        StageError: Workers were lost too often, or another run committed at the same time.
        LorasegError: As raised by stores, library and models; completed units are kept.
    """
    config = config.resolved()
    source: ConditionSource = MaskSource(
        config.masks, config.classes, config.split, config.sampling.size
    )
    state = open_run_state(config, source.label_space(), executor, resolve_models)
    output = open_store(config.output)
    committed = read_manifest(output)
    history = _read_history(output, committed)
    scanned = scan_conditions(source, source.list_conditions()[: config.limit], history)
    units = list(plan_units(scanned, config.sampling.images, config.masks_per_shard, history))
    rejected = tuple((one.ref.name, one.reason) for one in scanned if one.reason)[:_MAX_REJECTED]
    if committed is not None and (not units or not config.append):
        if units:
            raise ConfigError(_growth_message(config, units))
        if not output.exists(REPORT):  # an earlier run was killed after its commit
            write_report(ShardDataset(output, committed[0]), state)
        return SynthesisSummary(0, committed[0], rejected)
    shards = _generate_shards(state, executor, output, units)
    output.delete(REPORT)  # it describes the generation before
    manifest = _commit_manifest(output, state, committed, units, shards)
    write_report(ShardDataset(output, manifest), state)
    return SynthesisSummary(sum(shard.rows for shard in shards), manifest, rejected)


def _read_history(output: ObjectStore, committed: tuple[ShardManifest, str] | None) -> PlanHistory:
    history = PlanHistory()
    for plan in committed[0].plans if committed else ():
        decode_plan(output.get(_plan_key(plan)), f"{output.uri}/{_plan_key(plan)}", history)
    return history


def _generate_shards(
    state: SynthesisRunState,
    executor: Executor,
    output: ObjectStore,
    units: Sequence[SynthesisWorkUnit],
) -> list[ShardEntry]:
    """Return the shards of all units in their order; those of a killed run are reused."""
    shards = _written_shards(output, units, len(state.classes))
    if shards:
        logger.info("%d of %d shards were written by an earlier run", len(shards), len(units))
    pending = [unit for unit in units if unit.id not in shards]
    images = {unit.id: unit.image_count for unit in pending}
    logger.info("%d images to generate", sum(images.values()))
    progress, pairs, kept = Progress(sum(images.values())), 0, 0.0
    with closing(run_units(executor, STAGES, state, pending)) as results:
        for unit_id, shard in results:
            committed: CommittedShard = shard
            shards[unit_id] = committed.entry
            pairs += committed.statistics.pairs
            kept += committed.statistics.kept_sum
            share = 100 * kept / max(pairs, 1)
            progress.update(images[unit_id], f"{share:.0f} % of the labels kept")
    return [shards[unit.id] for unit in units]


def _written_shards(
    output: ObjectStore, units: Sequence[SynthesisWorkUnit], classes: int
) -> dict[str, ShardEntry]:
    """Return the shards that an earlier run wrote and did not commit, by unit id."""
    notes = set(output.list(f"{UNITS_PREFIX}/"))
    ids = [unit.id for unit in units if committed_key(unit.id) in notes]
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="notes") as pool:
        shards = list(pool.map(lambda unit_id: read_committed(output, unit_id, classes), ids))
    return {unit_id: shard.entry for unit_id, shard in zip(ids, shards, strict=True) if shard}


def _commit_manifest(
    output: ObjectStore,
    state: SynthesisRunState,
    committed: tuple[ShardManifest, str] | None,
    units: Sequence[SynthesisWorkUnit],
    shards: Sequence[ShardEntry],
) -> ShardManifest:
    plan = encode_plan(units)
    digest = hashlib.sha256(plan).hexdigest()
    output.put_if_absent(_plan_key(digest), plan)
    before, etag = committed or (None, None)
    masks = sum(len(unit.conditions) for unit in units if unit.first_image == 0)
    manifest = ShardManifest(
        generation=before.generation + 1 if before else 1,
        classes=state.classes,
        masks=(before.masks if before else 0) + masks,
        shards=(*(before.shards if before else ()), *(s for s in shards if s.rows)),
        plans=(*(before.plans if before else ()), digest),
        dataset_sha256=hashlib.sha256(output.get(STATE_FORMAT.key)).hexdigest(),
    )
    conflict = (
        f"{output.uri}: another run committed at the same time; run again, the shards are kept"
    )
    publish(output, MANIFEST_KEY, manifest.to_bytes(), etag, conflict=conflict)
    return manifest


def _plan_key(digest: str) -> str:
    return f"plans/{digest}.parquet"


def _growth_message(config: SynthesisConfig, units: Sequence[SynthesisWorkUnit]) -> str:
    new = sum(len(unit.conditions) for unit in units if unit.first_image == 0)
    incomplete = sum(len(unit.conditions) for unit in units if unit.first_image)
    return (
        f"{config.output} is complete; {new} masks are new and {incomplete} have fewer than "
        f"{config.sampling.images} images: give append=true to add them, or another output"
    )
