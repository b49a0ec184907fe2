"""Segment with adapters chosen for each image: embed -> retrieve -> fuse -> segment.

The method is SemLA's (arXiv 2503.21780; official code: ``domain_orchestrator``).
"""

from collections.abc import Collection, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch

from loraseg.errors import LorasegError
from loraseg.fuse.mix import Mix
from loraseg.inference.adapter_cache import AdapterPool
from loraseg.inference.adapter_ref import AdapterUnavailableError
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.inference.runner import SegmentRunner
from loraseg.inference.selection import (
    AdapterQuery,
    AdapterSelection,
    AdaptiveSettings,
    TilingMode,
    select_adapters,
)
from loraseg.segment.open_vocabulary.base import check_classes
from loraseg.segment.open_vocabulary.pixel_maps import check_maps
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.tiled_inference import needs_tiling
from loraseg.tensor_types import Float, ndarray

__all__ = ["ImageEncoder", "Segmenter", "run_to_completion"]

_T = TypeVar("_T")

_NO_IMAGE: ndarray = np.zeros((0, 0, 3), np.uint8)


@runtime_checkable
class ImageEncoder(Protocol):
    """The encoder that the centroids of the library were made with."""

    def encode_images(self, images: Sequence[ndarray]) -> Float[ndarray, "n d"]:
        """Return embeddings (n, d) of uint8 RGB images (h, w, 3), not normalised."""
        ...


@dataclass(frozen=True, slots=True)
class _PreparedImage:
    request: SegmentRequest
    mix: Mix | None
    is_tiled: bool


class Segmenter:
    """Segments each image with the adapters nearest to it. Not thread-safe."""

    def __init__(
        self,
        predictor: Predictor,
        encoder: ImageEncoder,
        pool: AdapterPool,
        settings: AdaptiveSettings,
    ) -> None:
        """Use loaded models; :func:`~loraseg.inference.loading.load_segmenter` loads them.

        Args:
            predictor: Runs the base.
            encoder: The encoder that the pool's centroids were made with.
            pool: The adapters to select from.
            settings: How adapters are selected.
        """
        self._runner = SegmentRunner(predictor, pool.load)
        self._encoder = encoder
        self._pool = pool
        self._settings = settings
        # On a GPU the encoder has its own stream, so that it runs in parallel with the segmenter.
        # Adapters are loaded on the segmenter's stream, which needs no synchronisation.
        device = predictor.base.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def segment(
        self,
        images: Sequence[ndarray],
        classes: Sequence[str],
        *,
        exclude: Collection[str] = (),
        maps: Collection[str] = (),
        tiling: TilingMode = "auto",
        keep_scores: bool = False,
    ) -> list[SegmentResult]:
        """Segment images, each with its own mix of adapters.

        Args:
            images: uint8 RGB arrays (h, w, 3); sizes may differ.
            classes: Distinct class names; their order gives the ids of the label maps.
            exclude: Names of adapters that must not be used, for instance in leave-one-out.
            maps: Further maps to compute: ``confidence``, ``entropy``.
            tiling: Whether an image is segmented in overlapping tiles of its own resolution, in
                either mode of the predictor; ``auto`` decides by its size
                (:func:`~loraseg.segment.open_vocabulary.tiled_inference.needs_tiling`).
            keep_scores: Also return the sigmoid scores (classes, h, w) in [0, 1]. Not possible
                for a tiled image.

        Returns:
            One result per image. Label maps are uint8 up to 255 classes, else int32; ties go to
            the class named first.

        Raises:
            AdapterMismatchError: A selected adapter was trained on another base.
            ConfigError: The classes are empty, blank or repeated; a map is unknown; or
                ``keep_scores`` is set for a tiled image.
            DatasetError: An image is not uint8 RGB.
            LorasegError: An adapter cannot be loaded.
        """
        template = self._request(classes, exclude, maps, tiling, keep_scores=keep_scores)
        return self._run(self._prepare(images, template))

    def segment_stream(
        self,
        batches: Iterable[Sequence[ndarray]],
        classes: Sequence[str],
        *,
        exclude: Collection[str] = (),
        maps: Collection[str] = (),
        tiling: TilingMode = "auto",
        keep_scores: bool = False,
    ) -> Generator[list[SegmentResult] | LorasegError, None, None]:
        """Segment batches like :meth:`segment`, preparing one batch ahead.

        While a batch is in the model, another thread takes the next one from ``batches`` (which may
        decode files), embeds it and loads its adapters.

        Yields:
            The results of each batch in order, or its error, since raising it would end the stream
            for all later batches.

        Raises:
            ConfigError: The classes are empty, blank or repeated, or a map is unknown.
        """
        template = self._request(classes, exclude, maps, tiling, keep_scores=keep_scores)
        source = iter(batches)

        def prepare_next() -> list[_PreparedImage] | LorasegError | None:
            images = next(source, None)
            if images is None:
                return None
            try:
                return self._prepare(images, template)
            except LorasegError as error:
                return error

        with ThreadPoolExecutor(1, thread_name_prefix="embed") as thread:
            upcoming = thread.submit(prepare_next)
            while (prepared := upcoming.result()) is not None:
                upcoming = thread.submit(prepare_next)
                if isinstance(prepared, LorasegError):
                    yield prepared
                    continue
                try:
                    results = self._run(prepared)
                except LorasegError as error:
                    yield error
                    continue
                yield results

    def _request(
        self,
        classes: Sequence[str],
        exclude: Collection[str],
        maps: Collection[str],
        tiling: TilingMode,
        *,
        keep_scores: bool,
    ) -> SegmentRequest:
        """Return the request of all images of a call, without an image."""
        check_classes(classes)
        check_maps(maps)
        return SegmentRequest(
            image=_NO_IMAGE,
            classes=tuple(classes),
            query=AdapterQuery(settings=self._settings, exclude=frozenset(exclude)),
            maps=frozenset(maps),
            tiling=tiling,
            keep_scores=keep_scores,
        )

    def _prepare(self, images: Sequence[ndarray], template: SegmentRequest) -> list[_PreparedImage]:
        """Embed images, select and load their adapters."""
        needs_embedding = self._settings.mode == "fused" and self._pool.retriever is not None
        with torch.cuda.stream(self._stream):
            embeddings = (
                self._encoder.encode_images(images) if needs_embedding and len(images) else None
            )
        selections = select_adapters(self._pool, embeddings, [template.query] * len(images))
        return [
            _PreparedImage(
                replace(template, image=image, selection=selection),
                self._fuse(selection),
                self._is_tiled(image, template.tiling),
            )
            for image, selection in zip(images, selections, strict=True)
        ]

    def _fuse(self, selection: AdapterSelection) -> Mix | None:
        try:
            return self._runner.fuse(selection)
        except AdapterUnavailableError as error:
            # The cause names files and URIs, which a user of this process may know.
            raise error.__cause__ or error from None

    def _is_tiled(self, image: ndarray, tiling: TilingMode) -> bool:
        if tiling == "auto" and image.ndim == 3:
            return needs_tiling(image.shape[0], image.shape[1], self._runner.predictor)
        return tiling == "always"

    def _run(self, prepared: Sequence[_PreparedImage]) -> list[SegmentResult]:
        """Segment whole images together, tiled images one after the other."""
        whole = [item for item in prepared if not item.is_tiled]
        results = iter(
            self._runner.run([item.request for item in whole], [item.mix for item in whole])
        )
        return [
            run_to_completion(self._runner.run_tiled(item.request, item.mix))
            if item.is_tiled
            else next(results)
            for item in prepared
        ]


def run_to_completion(generator: Generator[None, None, _T]) -> _T:
    """Exhaust a generator such as :meth:`SegmentRunner.run_tiled` and return its return value."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value
