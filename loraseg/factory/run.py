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

from loraseg.data.labels import LabelSpace
from loraseg.data.shard_manifest import MANIFEST, ShardEntry, ShardManifest, read_manifest
from loraseg.data.shard_reader import ShardDataset
from loraseg.errors import ConfigError, StageError
from loraseg.factory.config import SynthesisConfig
from loraseg.factory.draw import Draw
from loraseg.factory.equipment import look
from loraseg.factory.pinned import DATASET, Facts, Pinned, begin
from loraseg.factory.plan import Entry, Part, Planned, decode_plan, encode_plan, parts, survey
from loraseg.factory.report import REPORT, write_report
from loraseg.factory.sources import MaskSource
from loraseg.factory.tally import Tally
from loraseg.factory.work import DONE, Outcome, Vote, done_file, read_done
from loraseg.storage import ObjectStore, open_store

__all__ = ["Crew", "Here", "Summary", "synthesize"]

logger = logging.getLogger(__name__)

# Parts that are handed over at once: some MB in the driver, however many there are.
_WAVE = 2000
_READERS = 16
_TELL_EVERY_S = 10.0


@runtime_checkable
class Crew(Protocol):
    """Whoever does the work: this process, or a cluster."""

    threads: int
    device: str

    def look(self, config: SynthesisConfig, label_space: LabelSpace) -> Facts:
        """Load what a config names, and say what it is."""
        ...

    def make(self, pinned: Pinned, work: Sequence[Part]) -> Generator[Outcome, None, None]:
        """Do all parts, yielding each as it ends; closing stops what is under way."""
        ...


class Here:
    """Does one part after another in this process."""

    device = "cpu"

    def __init__(self, threads: int = 1) -> None:
        """Note the torch threads that the caller has set."""
        self.threads = threads
        self._stages: tuple[Draw, Vote] | None = None

    def look(self, config: SynthesisConfig, label_space: LabelSpace) -> Facts:
        """Load what a config names, and say what it is."""
        return look(config, label_space)

    def make(self, pinned: Pinned, work: Sequence[Part]) -> Generator[Outcome, None, None]:
        """Do all parts in order."""
        self._stages = self._stages or (Draw(pinned), Vote(pinned))
        draw, vote = self._stages
        for part in work:
            yield vote(draw(part))


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended.

    Attributes:
        new_rows: Rows that this run added to the dataset.
        manifest: What readers see now.
        refused: (name, reason) of masks of which no image was made by this run, at most 1,000.
    """

    new_rows: int
    manifest: ShardManifest
    refused: tuple[tuple[str, str], ...]


def synthesize(config: SynthesisConfig, crew: Crew) -> Summary:
    """Make what no earlier run into the same output has made, then commit it.

    May be killed at any time and started again. The commit is one conditional write of the
    manifest; before it, readers see nothing of this run.

    Args:
        config: What to make.
        crew: Does it.

    Raises:
        ConfigError: The output was begun with other settings, or is complete and would have to
            grow, which ``append`` allows.
        StageError: A worker was lost for good, or another run committed meanwhile.
        LorasegError: As raised by stores, library and models; what is done stays done.
    """
    config = config.resolved()
    source = MaskSource(config.masks, config.classes, config.split)
    label_space = source.label_space()
    pinned = begin(config, label_space, crew.threads, crew.device, crew.look)
    output = open_store(config.output)
    committed = read_manifest(output)
    done = _planned(output, committed)
    size = config.sampling.size
    masks = source.names()[: config.limit]
    entries = survey(source, masks, done, classes=len(label_space), size=size)
    work = list(parts(entries, config.sampling.images, config.masks_per_shard, done))
    refused = tuple((one.mask.name, one.reason) for one in entries if one.reason)[:1000]
    if committed is not None and (not work or not config.append):
        if work:
            raise ConfigError(_would_grow(config, work))
        if not output.exists(REPORT):  # killed after the commit
            write_report(ShardDataset(output, committed[0]), pinned)
        return Summary(0, committed[0], refused)
    shards = _make(pinned, crew, output, work)
    output.delete(REPORT)  # it tells of what was there before
    manifest = _commit(output, pinned, committed, work, shards)
    write_report(ShardDataset(output, manifest), pinned)
    return Summary(sum(shard.rows for shard in shards), manifest, refused)


def _planned(output: ObjectStore, committed: tuple[ShardManifest, str] | None) -> Planned:
    done = Planned()
    for plan in committed[0].plans if committed else ():
        decode_plan(output.get(_plan_file(plan)), f"{output.uri}/{_plan_file(plan)}", done)
    return done


def _make(
    pinned: Pinned, crew: Crew, output: ObjectStore, work: Sequence[Part]
) -> list[ShardEntry]:
    """Return the shards of all parts, in their order; those of an earlier try are taken over."""
    written = set(output.list(f"{DONE}/"))
    noted = [part for part in work if done_file(part.id) in written]
    classes = len(pinned.classes)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="parts") as pool:
        notes = list(pool.map(lambda part: read_done(output, part.id, classes), noted))
    found = {part.id: done.entry for part, done in zip(noted, notes, strict=True) if done}
    todo = [part for part in work if part.id not in found]
    progress = _Progress(work, todo)
    for wave in _waves(iter(todo)):
        with closing(crew.make(pinned, wave)) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None or outcome.done is None:
                    raise outcome.error or StageError(f"part {outcome.part}: no shard")
                found[outcome.part] = outcome.done.entry
                progress.tell(outcome.part, outcome.done.tally)
    return [found[part.id] for part in work]


def _waves(work: Iterator[Part]) -> Iterator[list[Part]]:
    while wave := list(islice(work, _WAVE)):
        yield wave


def _commit(
    output: ObjectStore,
    pinned: Pinned,
    committed: tuple[ShardManifest, str] | None,
    work: Sequence[Part],
    shards: Sequence[ShardEntry],
) -> ShardManifest:
    plan = encode_plan(work)
    digest = hashlib.sha256(plan).hexdigest()
    output.put_if_absent(_plan_file(digest), plan)
    before = committed[0] if committed else None
    masks = sum(part.first == 0 for part in work for _ in part.entries)
    manifest = ShardManifest(
        generation=before.generation + 1 if before else 1,
        classes=pinned.classes,
        masks=(before.masks if before else 0) + masks,
        shards=(*(before.shards if before else ()), *(s for s in shards if s.rows)),
        plans=(*(before.plans if before else ()), digest),
        dataset_sha256=hashlib.sha256(output.get(DATASET)).hexdigest(),
    )
    data = manifest.to_bytes()
    if committed is None:
        won = output.put_if_absent(MANIFEST, data)
    else:
        won = output.put_if_match(MANIFEST, data, committed[1])
    if not won and output.get(MANIFEST) != data:
        raise StageError(
            f"{output.uri}: another run committed at the same time; run again, what is made is kept"
        )
    return manifest


def _plan_file(digest: str) -> str:
    return f"plans/{digest}.parquet"


def _would_grow(config: SynthesisConfig, work: Sequence[Part]) -> str:
    fresh = sum(len(part.entries) for part in work if part.first == 0)
    longer = sum(len(part.entries) for part in work if part.first)
    return (
        f"{config.output} is complete; {fresh} masks are new and {longer} have fewer than "
        f"{config.sampling.images} images: give append=true to add them, or another output"
    )


class _Progress:
    """Logs how far it is, now and then."""

    def __init__(
        self,
        work: Sequence[Part],
        todo: Sequence[Part],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._started = self._told = clock()
        self._sizes = {part.id: _images(part) for part in todo}
        self._total, self._made = sum(self._sizes.values()), 0
        self._pairs, self._kept = 0, 0.0
        before = len(work) - len(todo)
        logger.info(
            "%d images of %d masks to make%s",
            self._total,
            sum(_usable(part.entries) for part in todo),
            f"; {before} of {len(work)} parts were made before" if before else "",
        )

    def tell(self, part: str, tally: Tally) -> None:
        self._made += self._sizes[part]
        self._pairs += tally.pairs
        self._kept += tally.kept
        now = self._clock()
        if now - self._told < _TELL_EVERY_S and self._made < self._total:
            return
        self._told = now
        rate = self._made / max(now - self._started, 1e-9)
        logger.info(
            "%d of %d images, %.2f a second, %.0f %% of the labels kept, %.0f s left",
            self._made,
            self._total,
            rate,
            100 * self._kept / max(self._pairs, 1),
            (self._total - self._made) / rate if rate else 0.0,
        )


def _images(part: Part) -> int:
    return _usable(part.entries) * (part.last - part.first + 1)


def _usable(entries: Iterable[Entry]) -> int:
    return sum(entry.reason is None for entry in entries)
