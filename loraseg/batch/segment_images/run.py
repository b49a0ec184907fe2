"""Segment all images below a store URI; begin, go on, or find that nothing is left to do."""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

from loraseg.batch.segment_images.completed import (
    CompletedIndex,
    FileSummary,
    invalidate,
    read_completed,
)
from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.batch.segment_images.manifest import (
    MANIFEST,
    count_statuses,
    encode_manifest,
    write_manifest,
)
from loraseg.batch.segment_images.plan import ImageWorkUnit, plan_units, stale_files
from loraseg.batch.segment_images.stage import ImageUnitResult, SegmentImagesStage, resolve_models
from loraseg.batch.segment_images.state import (
    ResolvedSegmentationModels,
    SegmentationRunState,
    open_or_create,
)
from loraseg.errors import LorasegError
from loraseg.storage import open_store

__all__ = [
    "LocalSegmentationExecutor",
    "SegmentImagesSummary",
    "SegmentationExecutor",
    "segment_images",
]

logger = logging.getLogger(__name__)

# Parts that are planned and handed over at once: tens of MB in the driver, however many there are.
_UNITS_PER_BATCH = 2000
_LOG_INTERVAL_S = 10.0


@runtime_checkable
class SegmentationExecutor(Protocol):
    """Whoever does the work: this process, or a cluster."""

    threads: int
    device: str

    def resolve_models(self, config: SegmentImagesConfig) -> ResolvedSegmentationModels:
        """Load what a config names, and say what it is."""
        ...

    def run(
        self, state: SegmentationRunState, units: Sequence[ImageWorkUnit]
    ) -> Generator[ImageUnitResult, None, None]:
        """Do all parts, yielding each as it ends; closing stops what is under way."""
        ...


class LocalSegmentationExecutor:
    """Does one part after another in this process."""

    device = "cpu"

    def __init__(self, threads: int = 1) -> None:
        """Note the torch threads that the caller has set."""
        self.threads = threads
        self._stage: SegmentImagesStage | None = None

    def resolve_models(self, config: SegmentImagesConfig) -> ResolvedSegmentationModels:
        """Load what a config names, and say what it is."""
        return resolve_models(config)

    def run(
        self, state: SegmentationRunState, units: Sequence[ImageWorkUnit]
    ) -> Generator[ImageUnitResult, None, None]:
        """Do all parts in order."""
        self._stage = self._stage or SegmentImagesStage(state)
        yield from map(self._stage, units)


@dataclass(frozen=True, slots=True)
class SegmentImagesSummary:
    """How a run ended.

    Attributes:
        new_images: Images that this run did.
        statuses: How many of all images, earlier runs' included, ended how.
        generation: Of the library; None without one.
    """

    new_images: int
    statuses: dict[str, int]
    generation: int | None


def segment_images(
    config: SegmentImagesConfig, executor: SegmentationExecutor
) -> SegmentImagesSummary:
    """Segment what no earlier run into the same output has, then write the manifest.

    May be killed at any time and started again; images are read, masks and explanations written
    as they come, so memory does not grow with their number but for 40 bytes an image.

    Args:
        config: What to do.
        executor: Does it.

    Raises:
        ConfigError: The output was begun with other settings, or a setting is wrong.
        StageError: A worker was lost for good.
        LorasegError: As raised by stores, library and models; what is done stays done.
    """
    config = config.resolved()
    pinned = open_or_create(config, executor.threads, executor.device, executor.resolve_models)
    if pinned.models.vacancy and config.mode != "base":
        logger.warning("all images get the bare base: %s", pinned.models.vacancy)
    images, output = open_store(config.images), open_store(config.output)
    ledger = read_completed(output)
    stale = stale_files(images, ledger)
    if stale:
        output.delete(MANIFEST)
        logger.info("%d files hold replaced or failed images: done anew", len(stale))
        for file in sorted(stale):
            invalidate(output, file)
        ledger = read_completed(output)
    files, new = dict(ledger.files), 0
    todo = plan_units(images.list_objects(), ledger, config.images_per_file)
    progress = _Progress(ledger)
    for wave in _batches(todo):
        if not new:
            output.delete(MANIFEST)  # it says that all is done
        with closing(executor.run(pinned, wave)) as outcomes:
            for file, facts in _completed_files(outcomes):
                files[file] = facts
                new += sum(facts.statuses.values())
                progress.update(new, facts)
    write_manifest(output, encode_manifest(pinned, files))
    return SegmentImagesSummary(new, count_statuses(files), pinned.config.generation)


def _batches(units: Iterator[ImageWorkUnit]) -> Iterator[list[ImageWorkUnit]]:
    while wave := list(islice(units, _UNITS_PER_BATCH)):
        yield wave


def _completed_files(results: Iterable[ImageUnitResult]) -> Iterator[tuple[str, FileSummary]]:
    for outcome in results:
        if isinstance(outcome.result, LorasegError):
            raise outcome.result
        yield outcome.unit.file, outcome.result


class _Progress:
    """Logs how far it is, now and then."""

    def __init__(
        self, completed: CompletedIndex, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._completed_before, self._clock = len(completed.ids), clock
        self._started_at = self._logged_at = clock()
        self._without_mask = 0
        if self._completed_before:
            logger.info("%d images were done before", self._completed_before)

    def update(self, new: int, facts: FileSummary) -> None:
        self._without_mask += sum(facts.statuses.values()) - facts.statuses.get("ok", 0)
        now = self._clock()
        if now - self._logged_at < _LOG_INTERVAL_S:
            return
        self._logged_at = now
        rate = new / (now - self._started_at)
        logger.info(
            "%d images done, %d of them without a mask, %.1f a second",
            new,
            self._without_mask,
            rate,
        )
