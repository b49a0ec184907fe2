"""One part of the work: read images, segment them, write masks, then the explanations."""

import hashlib
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loraseg.bulk.config import BulkConfig
from loraseg.bulk.ledger import FileFacts
from loraseg.bulk.mask_names import id_of
from loraseg.bulk.pinned import Facts, Pinned
from loraseg.bulk.plan import MAX_IMAGE_BYTES, Item, Part
from loraseg.bulk.rows import encode, found, printable, refused
from loraseg.data.uploads import decode_image
from loraseg.engine.assemble import equip
from loraseg.errors import (
    ConfigError,
    DatasetError,
    IntegrityError,
    LorasegError,
    StoreError,
)
from loraseg.segment.adaptive import AdaptiveSegmenter, Segmentation
from loraseg.segment.predictor import Predictor
from loraseg.segment.render import palette_png
from loraseg.storage import ObjectNotFoundError, open_store
from loraseg.storage.store import key_fault
from loraseg.tensor_types import ndarray

__all__ = ["Outcome", "PartSegmenter", "look"]

# Objects read ahead and masks on their way out, so that a distant store holds up nothing.
_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part; after an error nothing of it is committed."""

    part: Part
    result: FileFacts | LorasegError


def look(config: BulkConfig) -> Facts:
    """Load what a config names, and say what it is."""
    equipment = equip(config.wanted())
    pool, base = equipment.pool, equipment.base
    return Facts(
        base=base.digest,
        encoder=equipment.encoder.encoder_id,
        clip_attention_lora=base.model.config.clip_attention_lora,
        vacancy=None if pool.entries else pool.vacancy,
    )


@dataclass(slots=True)
class _Opened:
    """An image whose turn in the model has come."""

    item: Item
    row: dict[str, Any]


class PartSegmenter:
    """Does parts of one job. Loads the models for the first; one thread at a time.

    Images go through the model one by one: which images a batch holds would change the last bits,
    and after a kill other images are left.
    """

    def __init__(self, pinned: Pinned) -> None:
        """Take the job; nothing is loaded yet, so that a failure to is an outcome."""
        self._pinned = pinned
        self._images = open_store(pinned.config.images)
        self._output = open_store(pinned.config.output)
        self._label_space = pinned.config.label_space()

    def __call__(self, part: Part) -> Outcome:
        """Write the part's masks and, when all are there, its explanations."""
        try:
            return Outcome(part, self._commit(part, self._rows(part)))
        except LorasegError as error:
            return Outcome(part, error)

    @cached_property
    def _segmenter(self) -> AdaptiveSegmenter:
        config = self._pinned.config
        equipment = equip(config.wanted())
        then, now = self._pinned.facts, equipment
        if (then.base, then.encoder) != (now.base.digest, now.encoder.encoder_id):
            raise ConfigError(
                f"{config.output} was begun with base {then.base} and encoder {then.encoder}; "
                f"{config.base} and {config.encoder} are now {now.base.digest} and "
                f"{now.encoder.encoder_id}"
            )
        predictor = Predictor(equipment.base, mode="sliding" if config.sliding else "plain")
        return AdaptiveSegmenter(predictor, equipment.encoder, equipment.pool, config.settings())

    def _rows(self, part: Part) -> list[dict[str, Any]]:
        rows = [self._blank(item) for item in part.items]
        turns: deque[_Opened] = deque()
        writes: deque[tuple[dict[str, Any], Future[str]]] = deque()
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="store") as pool:
            batches = self._opened(part.items, rows, turns, pool)
            results = self._segmenter.segment_stream(
                batches, self._label_space.names, tiling=self._pinned.config.tiling
            )
            for outcome in results:
                opened = turns.popleft()
                if isinstance(outcome, LorasegError):
                    if _may_pass(outcome):
                        raise outcome
                    opened.row.update(refused("failed", outcome))
                    continue
                opened.row.update(found(outcome[0], self._label_space.names))
                opened.row["mask"] = opened.item.mask
                writes.append((opened.row, pool.submit(self._write, opened.item, outcome[0])))
                if len(writes) > _IN_FLIGHT:
                    _note(*writes.popleft())
            for row, write in writes:
                _note(row, write)
        return rows

    def _blank(self, item: Item) -> dict[str, Any]:
        pinned = self._pinned
        return {
            "key": printable(item.key),
            "id": id_of(item.key),
            "etag": item.etag,
            "classes": list(self._label_space.names),
            "base": pinned.facts.base,
            "generation": pinned.config.generation,
        }

    def _opened(
        self,
        items: Sequence[Item],
        rows: Sequence[dict[str, Any]],
        turns: deque[_Opened],
        pool: ThreadPoolExecutor,
    ) -> Generator[list[ndarray], None, None]:
        """Yield the images that can be decoded; the rows of all others tell why not."""
        for item, row, read in _ahead(self._get, items, rows, pool):
            data, trouble = read.result()
            row.update(trouble)
            if data is None:
                continue
            bytes_, row["etag"] = data
            row["image_sha256"] = hashlib.sha256(bytes_).hexdigest()
            try:
                image = decode_image(bytes_)
            except DatasetError as error:
                row.update(refused("bad_image", error))
                continue
            turns.append(_Opened(item, row))
            yield [image]

    def _get(self, item: Item) -> tuple[tuple[bytes, str] | None, dict[str, Any]]:
        if key_fault(item.key):
            return None, refused("bad_key", "no store takes a key like this")
        if item.size_bytes > MAX_IMAGE_BYTES:
            return None, refused("too_large", f"{item.size_bytes} bytes")
        try:
            return self._images.get_with_etag(item.key), {}
        except ObjectNotFoundError:
            return None, refused("gone", "the object went after it was listed")

    def _write(self, item: Item, result: Segmentation) -> str:
        data = palette_png(result.label_map, self._label_space)
        self._output.put(item.mask, data)
        return hashlib.sha256(data).hexdigest()

    def _commit(self, part: Part, rows: Sequence[dict[str, Any]]) -> FileFacts:
        data = encode(rows)
        if not self._output.put_if_absent(part.file, data):
            # A run beside this one, or this part's first attempt before its worker was lost.
            kept = self._output.get(part.file)
            if kept != data:
                raise IntegrityError(
                    f"{self._output.uri}/{part.file} holds other explanations than this run's; "
                    "images or adapters changed while two runs were under way: run again"
                )
        statuses = dict(sorted(Counter(row["status"] for row in rows).items()))
        return FileFacts(hashlib.sha256(data).hexdigest(), statuses)


def _ahead(
    get: Any, items: Sequence[Item], rows: Sequence[dict[str, Any]], pool: ThreadPoolExecutor
) -> Iterator[tuple[Item, dict[str, Any], Future[Any]]]:
    """Read some objects ahead, in order."""
    waiting: deque[tuple[Item, dict[str, Any], Future[Any]]] = deque()
    for item, row in zip(items, rows, strict=True):
        waiting.append((item, row, pool.submit(get, item)))
        if len(waiting) == _IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting


def _may_pass(error: LorasegError) -> bool:
    """Tell a store out of reach, which ends the run, from what is wrong with one adapter."""
    return isinstance(error, StoreError) and not isinstance(error, ObjectNotFoundError)


def _note(row: dict[str, Any], write: Future[str]) -> None:
    row["mask_sha256"] = write.result()
