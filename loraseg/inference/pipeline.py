"""Segment with adapters chosen for each image: embed -> retrieve -> fuse -> segment.

The method is SemLA's (methods B.4 and B.5).
"""

from collections.abc import Collection, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch

from loraseg.errors import LorasegError
from loraseg.fuse.mix import Mix
from loraseg.inference.adapter_cache import AdapterPool, UnusableAdaptersError
from loraseg.inference.runner import (
    AdapterContribution,
    Explanation,
    Segmentation,
    SegmentJob,
    SegmentRunner,
)
from loraseg.inference.selection import (
    PRESETS,
    AdapterQuery,
    AdapterSelection,
    AdaptiveSettings,
    TilingMode,
    default_adaptive_settings,
    select_adapters,
)
from loraseg.segment.open_vocabulary.base import check_classes
from loraseg.segment.open_vocabulary.pixel_maps import check_maps, label_map
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.tiled_inference import needs_tiling
from loraseg.tensor_types import ndarray

__all__ = [
    "PRESETS",
    "AdapterContribution",
    "AdaptiveSegmenter",
    "AdaptiveSettings",
    "Explanation",
    "SegmentJob",
    "SegmentRunner",
    "Segmentation",
    "TilingMode",
    "default_adaptive_settings",
    "label_map",
    "run_to_completion",
]

_T = TypeVar("_T")


@runtime_checkable
class ImageEncoder(Protocol):
    """The encoder that the centroids of the library were made with."""

    def encode_images(self, images: Sequence[ndarray]) -> ndarray:
        """Return embeddings (n, d) of uint8 RGB images, not normalised."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _SegmentOptions:
    """What holds for all images of a call."""

    classes: tuple[str, ...]
    exclude: frozenset[str]
    maps: frozenset[str]
    tiling: TilingMode
    keep_scores: bool


@dataclass(frozen=True, slots=True)
class _PreparedImage:
    """An image that has only to go through the model."""

    job: SegmentJob
    is_tiled: bool


class AdaptiveSegmenter:
    """Segments each image with the adapters nearest to it. One thread at a time."""

    def __init__(
        self,
        predictor: Predictor,
        encoder: ImageEncoder,
        pool: AdapterPool,
        settings: AdaptiveSettings,
    ) -> None:
        self._runner = SegmentRunner(predictor, pool.load)
        self._encoder = encoder
        self._pool = pool
        self._settings = settings
        # On a GPU the embedder keeps off the stream that the segmenter fills, so that both run at
        # once. Adapters are read on the segmenter's: their memory is handed on without waiting.
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
    ) -> list[Segmentation]:
        """Segment images, each with its own mix of adapters.

        Args:
            images: uint8 RGB arrays (h, w, 3); sizes may differ.
            classes: Distinct class names; their order gives the indices of the label maps.
            exclude: Names of adapters that must not be used, for instance in leave-one-out.
            maps: Further maps to return, ``confidence`` and ``entropy``.
            tiling: Whether an image goes through the model as overlapping tiles of its own
                resolution, whatever the predictor's mode; ``auto`` decides by its size
                (:func:`~loraseg.segment.open_vocabulary.tiled_inference.needs_tiles`).
            keep_scores: Also return the sigmoid scores (classes, h, w) in [0, 1]. They do not
                exist for an image in tiles.

        Returns:
            One result per image. Label maps are uint8 up to 255 classes, else int32; ties go to
            the class named first.

        Raises:
            AdapterMismatchError: A chosen adapter was trained on another base.
            ConfigError: No class is named, one is blank, or one twice; a map is unknown;
                or scores of an image in tiles are wanted.
            LorasegError: An adapter cannot be loaded.
        """
        options = _validated_options(classes, exclude, maps, tiling, keep_scores=keep_scores)
        return self._run(self._prepare(images, options), options.classes)

    def segment_stream(
        self,
        batches: Iterable[Sequence[ndarray]],
        classes: Sequence[str],
        *,
        exclude: Collection[str] = (),
        maps: Collection[str] = (),
        tiling: TilingMode = "auto",
        keep_scores: bool = False,
    ) -> Generator[list[Segmentation] | LorasegError, None, None]:
        """Segment batch after batch like :meth:`segment`, one batch ahead of itself.

        While a batch is in the model, the next one is taken from ``batches`` (which may decode
        files), embedded, and its adapters are read, in a thread of its own.

        Yields:
            The results of each batch in order, or its error in their place: raising it would end
            the stream for all later ones.

        Raises:
            ConfigError: No class is named, one is blank, or one twice; a map is unknown.
        """
        options = _validated_options(classes, exclude, maps, tiling, keep_scores=keep_scores)
        source = iter(batches)

        def ahead() -> list[_PreparedImage] | LorasegError | None:
            images = next(source, None)
            if images is None:
                return None
            try:
                return self._prepare(images, options)
            except LorasegError as error:
                return error

        with ThreadPoolExecutor(1, thread_name_prefix="embed") as thread:
            upcoming = thread.submit(ahead)
            while (ready := upcoming.result()) is not None:
                upcoming = thread.submit(ahead)
                if isinstance(ready, LorasegError):
                    yield ready
                    continue
                try:
                    results = self._run(ready, options.classes)
                except LorasegError as error:
                    yield error
                    continue
                yield results

    def _prepare(self, images: Sequence[ndarray], options: _SegmentOptions) -> list[_PreparedImage]:
        """Embed, retrieve and read adapters: all that does not need the segmenter."""
        wish = AdapterQuery(settings=self._settings, exclude=options.exclude)
        needed = self._settings.mode == "fused" and self._pool.retriever is not None
        with torch.cuda.stream(self._stream):
            embeddings = self._encoder.encode_images(images) if needed and len(images) else None
        choices = select_adapters(self._pool, embeddings, [wish] * len(images))
        return [
            _PreparedImage(
                SegmentJob(
                    image=image,
                    selection=choice,
                    mix=self._fuse(choice),
                    maps=options.maps,
                    keep_scores=options.keep_scores,
                ),
                is_tiled=self._is_tiled(image, options),
            )
            for image, choice in zip(images, choices, strict=True)
        ]

    def _fuse(self, choice: AdapterSelection) -> Mix | None:
        try:
            return self._runner.fuse(choice)
        except UnusableAdaptersError as error:
            _, first = error.failures[0]
            raise first from None

    def _is_tiled(self, image: ndarray, options: _SegmentOptions) -> bool:
        if options.tiling == "auto" and image.ndim == 3:
            return needs_tiling(image.shape[0], image.shape[1], self._runner.predictor)
        return options.tiling == "always"

    def _run(
        self, prepared: Sequence[_PreparedImage], classes: Sequence[str]
    ) -> list[Segmentation]:
        """Run whole images together, images in tiles one after the other."""
        whole = iter(self._runner.run([r.job for r in prepared if not r.is_tiled], classes))
        return [
            run_to_completion(self._runner.run_tiled(r.job, classes)) if r.is_tiled else next(whole)
            for r in prepared
        ]


def run_to_completion(generator: Generator[None, None, _T]) -> _T:
    """Run work that pauses, such as :meth:`Runner.run_tiled`, to its end."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def _validated_options(
    classes: Sequence[str],
    exclude: Collection[str],
    maps: Collection[str],
    tiling: TilingMode,
    *,
    keep_scores: bool,
) -> _SegmentOptions:
    check_classes(classes)
    check_maps(maps)
    return _SegmentOptions(
        classes=tuple(classes),
        exclude=frozenset(exclude),
        maps=frozenset(maps),
        tiling=tiling,
        keep_scores=keep_scores,
    )
