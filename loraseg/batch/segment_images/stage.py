"""One part of the work: read images, segment them, write masks, then the explanations."""

import hashlib
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loraseg.batch.segment_images.completed import FileSummary
from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.batch.segment_images.mask_names import key_id
from loraseg.batch.segment_images.plan import MAX_IMAGE_BYTES, ImageItem, ImageWorkUnit
from loraseg.batch.segment_images.state import ResolvedSegmentationModels, SegmentationRunState
from loraseg.batch.segment_images.table import (
    encode_rows,
    error_columns,
    result_columns,
    to_printable,
)
from loraseg.data.untrusted_images import decode_image
from loraseg.errors import (
    ConfigError,
    DatasetError,
    IntegrityError,
    LorasegError,
    StoreError,
)
from loraseg.inference.loading import load_models
from loraseg.inference.request import SegmentResult
from loraseg.inference.segmenter import Segmenter
from loraseg.segment.render import palette_png
from loraseg.storage import ObjectNotFoundError, open_store
from loraseg.storage.store import key_error
from loraseg.tensor_types import ndarray

__all__ = ["ImageUnitResult", "SegmentImagesStage", "resolve_models"]

# Objects read ahead and masks on their way out, so that a distant store holds up nothing.
_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class ImageUnitResult:
    """What became of a part; after an error nothing of it is committed."""

    unit: ImageWorkUnit
    result: FileSummary | LorasegError


def resolve_models(config: SegmentImagesConfig) -> ResolvedSegmentationModels:
    """Load what a config names, and say what it is."""
    models = load_models(config, config.library, config.generation)
    pool, base = models.pool, models.base
    return ResolvedSegmentationModels(
        base=base.digest,
        encoder=models.encoder.encoder_id,
        clip_attention_lora=base.model.config.clip_attention_lora,
        vacancy=None if pool.entries else pool.empty_reason,
    )


@dataclass(slots=True)
class _DecodedImage:
    """An image whose turn in the model has come."""

    item: ImageItem
    row: dict[str, Any]


class SegmentImagesStage:
    """Does parts of one job. Loads the models for the first; one thread at a time.

    Images go through the model one by one: which images a batch holds would change the last bits,
    and after a kill other images are left.
    """

    def __init__(self, state: SegmentationRunState) -> None:
        """Take the job; nothing is loaded yet, so that a failure to is an outcome."""
        self._state = state
        self._images = open_store(state.config.images)
        self._output = open_store(state.config.output)
        self._label_space = state.config.label_space()

    def __call__(self, part: ImageWorkUnit) -> ImageUnitResult:
        """Write the part's masks and, when all are there, its explanations."""
        try:
            return ImageUnitResult(part, self._write_explanations(part, self._segment_rows(part)))
        except LorasegError as error:
            return ImageUnitResult(part, error)

    @cached_property
    def _segmenter(self) -> Segmenter:
        config = self._state.config
        then, now = self._state.models, load_models(config, config.library, config.generation)
        if (then.base, then.encoder) != (now.base.digest, now.encoder.encoder_id):
            raise ConfigError(
                f"{config.output} was begun with base {then.base} and encoder {then.encoder}; "
                f"{config.base} and {config.encoder} are now {now.base.digest} and "
                f"{now.encoder.encoder_id}"
            )
        return now.segmenter(config.settings(), sliding=config.sliding)

    def _segment_rows(self, unit: ImageWorkUnit) -> list[dict[str, Any]]:
        rows = [self._initial_row(item) for item in unit.items]
        turns: deque[_DecodedImage] = deque()
        writes: deque[tuple[dict[str, Any], Future[str]]] = deque()
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="store") as pool:
            batches = self._decoded_images(unit.items, rows, turns, pool)
            results = self._segmenter.segment_stream(
                batches, self._label_space.names, tiling=self._state.config.tiling
            )
            for outcome in results:
                opened = turns.popleft()
                if isinstance(outcome, LorasegError):
                    if _is_transient(outcome):
                        raise outcome
                    opened.row.update(error_columns("failed", outcome))
                    continue
                opened.row.update(result_columns(outcome[0], self._label_space.names))
                opened.row["mask"] = opened.item.mask
                writes.append((opened.row, pool.submit(self._write, opened.item, outcome[0])))
                if len(writes) > _IN_FLIGHT:
                    _record_mask_digest(*writes.popleft())
            for row, write in writes:
                _record_mask_digest(row, write)
        return rows

    def _initial_row(self, item: ImageItem) -> dict[str, Any]:
        pinned = self._state
        return {
            "key": to_printable(item.key),
            "id": key_id(item.key),
            "etag": item.etag,
            "classes": list(self._label_space.names),
            "base": pinned.models.base,
            "generation": pinned.config.generation,
        }

    def _decoded_images(
        self,
        items: Sequence[ImageItem],
        rows: Sequence[dict[str, Any]],
        decoded: deque[_DecodedImage],
        pool: ThreadPoolExecutor,
    ) -> Generator[list[ndarray], None, None]:
        """Yield the images that can be decoded; the rows of all others tell why not."""
        for item, row, read in _read_ahead(self._read, items, rows, pool):
            data, trouble = read.result()
            row.update(trouble)
            if data is None:
                continue
            bytes_, row["etag"] = data
            row["image_sha256"] = hashlib.sha256(bytes_).hexdigest()
            try:
                image = decode_image(bytes_)
            except DatasetError as error:
                row.update(error_columns("bad_image", error))
                continue
            decoded.append(_DecodedImage(item, row))
            yield [image]

    def _read(self, item: ImageItem) -> tuple[tuple[bytes, str] | None, dict[str, Any]]:
        if key_error(item.key):
            return None, error_columns("bad_key", "no store takes a key like this")
        if item.size_bytes > MAX_IMAGE_BYTES:
            return None, error_columns("too_large", f"{item.size_bytes} bytes")
        try:
            return self._images.get_with_etag(item.key), {}
        except ObjectNotFoundError:
            return None, error_columns("gone", "the object went after it was listed")

    def _write(self, item: ImageItem, result: SegmentResult) -> str:
        data = palette_png(result.label_map, self._label_space)
        self._output.put(item.mask, data)
        return hashlib.sha256(data).hexdigest()

    def _write_explanations(
        self, unit: ImageWorkUnit, rows: Sequence[dict[str, Any]]
    ) -> FileSummary:
        data = encode_rows(rows)
        if not self._output.put_if_absent(unit.file, data):
            # A run beside this one, or this part's first attempt before its worker was lost.
            kept = self._output.get(unit.file)
            if kept != data:
                raise IntegrityError(
                    f"{self._output.uri}/{unit.file} holds other explanations than this run's; "
                    "images or adapters changed while two runs were under way: run again"
                )
        statuses = dict(sorted(Counter(row["status"] for row in rows).items()))
        return FileSummary(hashlib.sha256(data).hexdigest(), statuses)


def _read_ahead(
    read: Any, items: Sequence[ImageItem], rows: Sequence[dict[str, Any]], pool: ThreadPoolExecutor
) -> Iterator[tuple[ImageItem, dict[str, Any], Future[Any]]]:
    """Read some objects ahead, in order."""
    waiting: deque[tuple[ImageItem, dict[str, Any], Future[Any]]] = deque()
    for item, row in zip(items, rows, strict=True):
        waiting.append((item, row, pool.submit(read, item)))
        if len(waiting) == _IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting


def _is_transient(error: LorasegError) -> bool:
    """Tell a store out of reach, which ends the run, from what is wrong with one adapter."""
    return isinstance(error, StoreError) and not isinstance(error, ObjectNotFoundError)


def _record_mask_digest(row: dict[str, Any], write: Future[str]) -> None:
    row["mask_sha256"] = write.result()
