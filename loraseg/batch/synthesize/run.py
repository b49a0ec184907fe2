"""The run: begin or go on, make what is missing, commit."""

import hashlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.filter_stage import (
    UNITS_PREFIX,
    FilterStage,
    MaskUnitResult,
    committed_key,
    read_committed,
)
from loraseg.batch.synthesize.generate_stage import GenerateStage
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.batch.synthesize.models import resolve_models
from loraseg.batch.synthesize.plan import (
    MaskWorkUnit,
    PlanHistory,
    ScannedMask,
    decode_plan,
    encode_plan,
    plan_units,
    scan_masks,
)
from loraseg.batch.synthesize.report import REPORT, write_report
from loraseg.batch.synthesize.shard_statistics import ShardStatistics
from loraseg.batch.synthesize.state import (
    DATASET_KEY,
    ResolvedSynthesisModels,
    SynthesisRunState,
    open_or_create,
)
from loraseg.data.labels import LabelSpace
from loraseg.data.shards.manifest import MANIFEST_KEY, ShardEntry, ShardManifest, read_manifest
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import ConfigError, StageError
from loraseg.storage import ObjectStore, open_store

__all__ = ["LocalSynthesisExecutor", "SynthesisExecutor", "SynthesisSummary", "synthesize"]

logger = logging.getLogger(__name__)

# Parts that are handed over at once: some MB in the driver, however many there are.
_UNITS_PER_BATCH = 2000
_READ_THREADS = 16
_LOG_INTERVAL_S = 10.0


@runtime_checkable
class SynthesisExecutor(Protocol):
    """Whoever does the work: this process, or a cluster."""

    threads: int
    device: str

    def resolve_models(
        self, config: SynthesisConfig, label_space: LabelSpace
    ) -> ResolvedSynthesisModels:
        """Load what a config names, and say what it is."""
        ...

    def run(
        self, state: SynthesisRunState, units: Sequence[MaskWorkUnit]
    ) -> Generator[MaskUnitResult, None, None]:
        """Do all parts, yielding each as it ends; closing stops what is under way."""
        ...


class LocalSynthesisExecutor:
    """Does one part after another in this process."""

    device = "cpu"

    def __init__(self, threads: int = 1) -> None:
        """Note the torch threads that the caller has set."""
        self.threads = threads
        self._stages: tuple[GenerateStage, FilterStage] | None = None

    def resolve_models(
        self, config: SynthesisConfig, label_space: LabelSpace
    ) -> ResolvedSynthesisModels:
        """Load what a config names, and say what it is."""
        return resolve_models(config, label_space)

    def run(
        self, state: SynthesisRunState, units: Sequence[MaskWorkUnit]
    ) -> Generator[MaskUnitResult, None, None]:
        """Do all parts in order."""
        self._stages = self._stages or (GenerateStage(state), FilterStage(state))
        draw, vote = self._stages
        for part in units:
            yield vote(draw(part))


@dataclass(frozen=True, slots=True)
class SynthesisSummary:
    """How a run ended.

    Attributes:
        new_rows: Rows that this run added to the dataset.
        manifest: What readers see now.
        rejected: (name, reason) of masks of which no image was made by this run, at most 1,000.
    """

    new_rows: int
    manifest: ShardManifest
    rejected: tuple[tuple[str, str], ...]


def synthesize(config: SynthesisConfig, executor: SynthesisExecutor) -> SynthesisSummary:
    """Make what no earlier run into the same output has made, then commit it.

    May be killed at any time and started again. The commit is one conditional write of the
    manifest; before it, readers see nothing of this run.

    Args:
        config: What to make.
        executor: Does it.

    Raises:
        ConfigError: The output was begun with other settings, or is complete and would have to
            grow, which ``append`` allows.
        StageError: A worker was lost for good, or another run committed meanwhile.
        LorasegError: As raised by stores, library and models; what is done stays done.
    """
    config = config.resolved()
    source = MaskSource(config.masks, config.classes, config.split)
    label_space = source.label_space()
    pinned = open_or_create(
        config, label_space, executor.threads, executor.device, executor.resolve_models
    )
    output = open_store(config.output)
    committed = read_manifest(output)
    done = _read_history(output, committed)
    size = config.sampling.size
    masks = source.list_masks()[: config.limit]
    entries = scan_masks(source, masks, done, classes=len(label_space), size=size)
    work = list(plan_units(entries, config.sampling.images, config.masks_per_shard, done))
    refused = tuple((one.ref.name, one.reason) for one in entries if one.reason)[:1000]
    if committed is not None and (not work or not config.append):
        if work:
            raise ConfigError(_growth_message(config, work))
        if not output.exists(REPORT):  # killed after the commit
            write_report(ShardDataset(output, committed[0]), pinned)
        return SynthesisSummary(0, committed[0], refused)
    shards = _generate_shards(pinned, executor, output, work)
    output.delete(REPORT)  # it tells of what was there before
    manifest = _commit_manifest(output, pinned, committed, work, shards)
    write_report(ShardDataset(output, manifest), pinned)
    return SynthesisSummary(sum(shard.rows for shard in shards), manifest, refused)


def _read_history(output: ObjectStore, committed: tuple[ShardManifest, str] | None) -> PlanHistory:
    done = PlanHistory()
    for plan in committed[0].plans if committed else ():
        decode_plan(output.get(_plan_key(plan)), f"{output.uri}/{_plan_key(plan)}", done)
    return done


def _generate_shards(
    state: SynthesisRunState,
    executor: SynthesisExecutor,
    output: ObjectStore,
    units: Sequence[MaskWorkUnit],
) -> list[ShardEntry]:
    """Return the shards of all parts, in their order; those of an earlier try are taken over."""
    written = set(output.list(f"{UNITS_PREFIX}/"))
    noted = [part for part in units if committed_key(part.id) in written]
    classes = len(state.classes)
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="parts") as pool:
        notes = list(pool.map(lambda part: read_committed(output, part.id, classes), noted))
    found = {part.id: done.entry for part, done in zip(noted, notes, strict=True) if done}
    todo = [part for part in units if part.id not in found]
    progress = _Progress(units, todo)
    for wave in _batches(iter(todo)):
        with closing(executor.run(state, wave)) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None or outcome.shard is None:
                    raise outcome.error or StageError(f"part {outcome.unit_id}: no shard")
                found[outcome.unit_id] = outcome.shard.entry
                progress.update(outcome.unit_id, outcome.shard.statistics)
    return [found[part.id] for part in units]


def _batches(units: Iterator[MaskWorkUnit]) -> Iterator[list[MaskWorkUnit]]:
    while wave := list(islice(units, _UNITS_PER_BATCH)):
        yield wave


def _commit_manifest(
    output: ObjectStore,
    state: SynthesisRunState,
    committed: tuple[ShardManifest, str] | None,
    units: Sequence[MaskWorkUnit],
    shards: Sequence[ShardEntry],
) -> ShardManifest:
    plan = encode_plan(units)
    digest = hashlib.sha256(plan).hexdigest()
    output.put_if_absent(_plan_key(digest), plan)
    before = committed[0] if committed else None
    masks = sum(part.first_image == 0 for part in units for _ in part.masks)
    manifest = ShardManifest(
        generation=before.generation + 1 if before else 1,
        classes=state.classes,
        masks=(before.masks if before else 0) + masks,
        shards=(*(before.shards if before else ()), *(s for s in shards if s.rows)),
        plans=(*(before.plans if before else ()), digest),
        dataset_sha256=hashlib.sha256(output.get(DATASET_KEY)).hexdigest(),
    )
    data = manifest.to_bytes()
    if committed is None:
        won = output.put_if_absent(MANIFEST_KEY, data)
    else:
        won = output.put_if_match(MANIFEST_KEY, data, committed[1])
    if not won and output.get(MANIFEST_KEY) != data:
        raise StageError(
            f"{output.uri}: another run committed at the same time; run again, what is made is kept"
        )
    return manifest


def _plan_key(digest: str) -> str:
    return f"plans/{digest}.parquet"


def _growth_message(config: SynthesisConfig, units: Sequence[MaskWorkUnit]) -> str:
    fresh = sum(len(part.masks) for part in units if part.first_image == 0)
    longer = sum(len(part.masks) for part in units if part.first_image)
    return (
        f"{config.output} is complete; {fresh} masks are new and {longer} have fewer than "
        f"{config.sampling.images} images: give append=true to add them, or another output"
    )


class _Progress:
    """Logs how far it is, now and then."""

    def __init__(
        self,
        units: Sequence[MaskWorkUnit],
        pending: Sequence[MaskWorkUnit],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._started_at = self._logged_at = clock()
        self._sizes = {part.id: _image_count(part) for part in pending}
        self._total, self._generated = sum(self._sizes.values()), 0
        self._pairs, self._kept = 0, 0.0
        before = len(units) - len(pending)
        logger.info(
            "%d images of %d masks to make%s",
            self._total,
            sum(_usable_count(part.masks) for part in pending),
            f"; {before} of {len(units)} parts were made before" if before else "",
        )

    def update(self, unit_id: str, statistics: ShardStatistics) -> None:
        self._generated += self._sizes[unit_id]
        self._pairs += statistics.pairs
        self._kept += statistics.kept_sum
        now = self._clock()
        if now - self._logged_at < _LOG_INTERVAL_S and self._generated < self._total:
            return
        self._logged_at = now
        rate = self._generated / max(now - self._started_at, 1e-9)
        logger.info(
            "%d of %d images, %.2f a second, %.0f %% of the labels kept, %.0f s left",
            self._generated,
            self._total,
            rate,
            100 * self._kept / max(self._pairs, 1),
            (self._total - self._generated) / rate if rate else 0.0,
        )


def _image_count(unit: MaskWorkUnit) -> int:
    return _usable_count(unit.masks) * (unit.last_image - unit.first_image + 1)


def _usable_count(scanned: Iterable[ScannedMask]) -> int:
    return sum(entry.reason is None for entry in scanned)
