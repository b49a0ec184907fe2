"""The stage of the job: read the images of a unit, segment them, write masks and explanations."""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
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
from loraseg.data.masks import encode_mask
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
from loraseg.storage import ObjectNotFoundError, open_store
from loraseg.storage.store import key_error
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["SegmentImagesStage", "resolve_models"]

# Objects that are read ahead and masks that are being written, to hide the latency of the store.
_IN_FLIGHT = 4

Row = dict[str, Any]
Content = tuple[bytes, str]  # bytes and etag


def resolve_models(config: SegmentImagesConfig) -> ResolvedSegmentationModels:
    """Load the models of a config and return what their names resolve to.

    Raises:
        LorasegError: As raised by library, store and models.
    """
    models = load_models(config, config.library, config.generation)
    pool, base = models.pool, models.base
    return ResolvedSegmentationModels(
        base=base.digest,
        encoder=models.encoder.encoder_id,
        clip_attention_lora=base.clip_attention_lora,
        vacancy=None if pool.entries else pool.empty_reason,
    )


@dataclass(frozen=True, slots=True)
class _DecodedImage:
    """An image that the model segments next, and its row."""

    item: ImageItem
    row: Row


class SegmentImagesStage:
    """Segments units of one job. Loads the models for the first; one thread at a time.

    Images go through the model one by one: the last bits of a result depend on the batch, and
    after a kill the remaining images form other batches.
    """

    def __init__(self, state: SegmentationRunState) -> None:
        """Open the stores; models are loaded with the first unit."""
        self._state = state
        self._images = open_store(state.config.images)
        self._output = open_store(state.config.output)
        self._label_space = state.label_space

    def __call__(self, unit: ImageWorkUnit) -> FileSummary:
        """Write the masks of a unit and then its explanation file.

        Raises:
            ConfigError: Base or encoder are not those that the output was created with.
            IntegrityError: Another run has written other explanations for the same images.
            LorasegError: As raised by stores, library and models.
        """
        return self._write_explanations(unit, self._segment_rows(unit))

    @cached_property
    def _segmenter(self) -> Segmenter:
        config, recorded = self._state.config, self._state.models
        loaded = load_models(config, config.library, config.generation)
        if (recorded.base, recorded.encoder) != (loaded.base.digest, loaded.encoder.encoder_id):
            raise ConfigError(
                f"{config.output} was created with base {recorded.base} and encoder "
                f"{recorded.encoder}; {config.base} and {config.encoder} are now "
                f"{loaded.base.digest} and {loaded.encoder.encoder_id}"
            )
        return loaded.segmenter(config.settings(), sliding=config.sliding)

    def _segment_rows(self, unit: ImageWorkUnit) -> list[Row]:
        rows = [self._initial_row(item) for item in unit.items]
        decoded: deque[_DecodedImage] = deque()
        writes: deque[tuple[Row, Future[str]]] = deque()
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="store") as pool:
            batches = self._decoded_images(unit.items, rows, decoded, pool)
            results = self._segmenter.segment_stream(
                batches, self._label_space.names, tiling=self._state.config.tiling
            )
            for result in results:
                image = decoded.popleft()
                if isinstance(result, LorasegError):
                    if _is_store_failure(result):
                        raise result
                    image.row.update(error_columns("failed", result))
                    continue
                image.row.update(result_columns(result[0], self._label_space.names))
                image.row["mask"] = image.item.mask
                writes.append((image.row, pool.submit(self._write, image.item, result[0])))
                if len(writes) > _IN_FLIGHT:
                    _record_mask_digest(*writes.popleft())
            for row, write in writes:
                _record_mask_digest(row, write)
        return rows

    def _initial_row(self, item: ImageItem) -> Row:
        return {
            "key": to_printable(item.key),
            "id": key_id(item.key),
            "etag": item.etag,
            "classes": list(self._label_space.names),
            "base": self._state.models.base,
            "generation": self._state.config.generation,
        }

    def _decoded_images(
        self,
        items: Sequence[ImageItem],
        rows: Sequence[Row],
        decoded: deque[_DecodedImage],
        pool: ThreadPoolExecutor,
    ) -> Generator[list[UInt8[ndarray, "_ _ 3"]], None, None]:
        """Yield the images that can be decoded; record in the rows of the others why not."""
        for item, row, reading in _read_ahead(self._read, items, rows, pool):
            content, columns = reading.result()
            row.update(columns)
            if content is None:
                continue
            data, row["etag"] = content
            row["image_sha256"] = hashlib.sha256(data).hexdigest()
            try:
                image = decode_image(data)
            except DatasetError as error:
                row.update(error_columns("bad_image", error))
                continue
            decoded.append(_DecodedImage(item, row))
            yield [image]

    def _read(self, item: ImageItem) -> tuple[Content | None, Row]:
        """Return an image's bytes and etag, or None and the columns that say why not."""
        if key_error(item.key):
            return None, error_columns("bad_key", "no store accepts this key")
        if item.size_bytes > MAX_IMAGE_BYTES:
            return None, error_columns("too_large", f"{item.size_bytes} bytes")
        try:
            return self._images.get_with_etag(item.key), {}
        except ObjectNotFoundError:
            return None, error_columns("gone", "the object was deleted after it was listed")

    def _write(self, item: ImageItem, result: SegmentResult) -> str:
        data = encode_mask(result.label_map, self._label_space)
        self._output.put(item.mask, data)
        return hashlib.sha256(data).hexdigest()

    def _write_explanations(self, unit: ImageWorkUnit, rows: Sequence[Row]) -> FileSummary:
        data = encode_rows(rows)
        # The file exists if another run, or a worker that was lost, processed the same unit.
        if not self._output.put_if_absent(unit.id, data) and self._output.get(unit.id) != data:
            raise IntegrityError(
                f"{self._output.uri}/{unit.id} holds other explanations than those of this run; "
                "images or adapters changed during two simultaneous runs: run again"
            )
        statuses = dict(sorted(Counter(row["status"] for row in rows).items()))
        return FileSummary(hashlib.sha256(data).hexdigest(), statuses)


def _read_ahead(
    read: Callable[[ImageItem], tuple[Content | None, Row]],
    items: Sequence[ImageItem],
    rows: Sequence[Row],
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[ImageItem, Row, Future[tuple[Content | None, Row]]]]:
    """Yield items and rows in order, reading a few objects ahead."""
    pending: deque[tuple[ImageItem, Row, Future[tuple[Content | None, Row]]]] = deque()
    for item, row in zip(items, rows, strict=True):
        pending.append((item, row, pool.submit(read, item)))
        if len(pending) == _IN_FLIGHT:
            yield pending.popleft()
    yield from pending


def _is_store_failure(error: LorasegError) -> bool:
    """Return whether the store failed, which ends the run, rather than one adapter or image."""
    return isinstance(error, StoreError) and not isinstance(error, ObjectNotFoundError)


def _record_mask_digest(row: Row, write: Future[str]) -> None:
    row["mask_sha256"] = write.result()
