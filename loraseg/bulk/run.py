"""Segment all images below a store URI; begin, go on, or find that nothing is left to do."""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

from loraseg.bulk.config import BulkConfig
from loraseg.bulk.ledger import FileFacts, Ledger, read_ledger, retire
from loraseg.bulk.manifest import MANIFEST, counts, manifest, publish
from loraseg.bulk.pinned import Facts, Pinned, begin
from loraseg.bulk.plan import Part, parts, stale_files
from loraseg.bulk.work import Outcome, PartSegmenter, look
from loraseg.errors import LorasegError
from loraseg.storage import open_store

__all__ = ["Crew", "Here", "Summary", "segment_images"]

logger = logging.getLogger(__name__)

# Parts that are planned and handed over at once: tens of MB in the driver, however many there are.
_WAVE = 2000
_TELL_EVERY_S = 10.0


@runtime_checkable
class Crew(Protocol):
    """Whoever does the work: this process, or a cluster."""

    threads: int
    device: str

    def look(self, config: BulkConfig) -> Facts:
        """Load what a config names, and say what it is."""
        ...

    def segment(self, pinned: Pinned, work: Sequence[Part]) -> Generator[Outcome, None, None]:
        """Do all parts, yielding each as it ends; closing stops what is under way."""
        ...


class Here:
    """Does one part after another in this process."""

    device = "cpu"

    def __init__(self, threads: int = 1) -> None:
        """Note the torch threads that the caller has set."""
        self.threads = threads
        self._worker: PartSegmenter | None = None

    def look(self, config: BulkConfig) -> Facts:
        """Load what a config names, and say what it is."""
        return look(config)

    def segment(self, pinned: Pinned, work: Sequence[Part]) -> Generator[Outcome, None, None]:
        """Do all parts in order."""
        self._worker = self._worker or PartSegmenter(pinned)
        yield from map(self._worker, work)


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended.

    Attributes:
        new: Images that this run did.
        statuses: How many of all images, earlier runs' included, ended how.
        generation: Of the library; None without one.
    """

    new: int
    statuses: dict[str, int]
    generation: int | None


def segment_images(config: BulkConfig, crew: Crew) -> Summary:
    """Segment what no earlier run into the same output has, then write the manifest.

    May be killed at any time and started again; images are read, masks and explanations written
    as they come, so memory does not grow with their number but for 40 bytes an image.

    Args:
        config: What to do.
        crew: Does it.

    Raises:
        ConfigError: The output was begun with other settings, or a setting is wrong.
        StageError: A worker was lost for good.
        LorasegError: As raised by stores, library and models; what is done stays done.
    """
    config = config.resolved()
    pinned = begin(config, crew.threads, crew.device, crew.look)
    if pinned.facts.vacancy and config.mode != "base":
        logger.warning("all images get the bare base: %s", pinned.facts.vacancy)
    images, output = open_store(config.images), open_store(config.output)
    ledger = read_ledger(output)
    stale = stale_files(images, ledger)
    if stale:
        output.delete(MANIFEST)
        logger.info("%d files hold replaced or failed images: done anew", len(stale))
        for file in sorted(stale):
            retire(output, file)
        ledger = read_ledger(output)
    files, new = dict(ledger.files), 0
    todo = parts(images.scan(), ledger, config.images_per_file)
    progress = _Progress(ledger)
    for wave in _waves(todo):
        if not new:
            output.delete(MANIFEST)  # it says that all is done
        with closing(crew.segment(pinned, wave)) as outcomes:
            for file, facts in _facts(outcomes):
                files[file] = facts
                new += sum(facts.statuses.values())
                progress.tell(new, facts)
    publish(output, manifest(pinned, files))
    return Summary(new, counts(files), pinned.config.generation)


def _waves(work: Iterator[Part]) -> Iterator[list[Part]]:
    while wave := list(islice(work, _WAVE)):
        yield wave


def _facts(outcomes: Iterable[Outcome]) -> Iterator[tuple[str, FileFacts]]:
    for outcome in outcomes:
        if isinstance(outcome.result, LorasegError):
            raise outcome.result
        yield outcome.part.file, outcome.result


class _Progress:
    """Logs how far it is, now and then."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._before, self._clock = len(ledger.ids), clock
        self._started = self._told = clock()
        self._odd = 0
        if self._before:
            logger.info("%d images were done before", self._before)

    def tell(self, new: int, facts: FileFacts) -> None:
        self._odd += sum(facts.statuses.values()) - facts.statuses.get("ok", 0)
        now = self._clock()
        if now - self._told < _TELL_EVERY_S:
            return
        self._told = now
        rate = new / (now - self._started)
        logger.info(
            "%d images done, %d of them without a mask, %.1f a second", new, self._odd, rate
        )
