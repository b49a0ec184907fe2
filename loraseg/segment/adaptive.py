"""Segment with adapters chosen for each image: embed -> retrieve -> fuse -> segment.

The method is SemLA's (methods B.4 and B.5).
"""

from collections.abc import Collection, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from loraseg.errors import AdapterMismatchError, LorasegError
from loraseg.fuse.mix import Mix, fuse
from loraseg.segment.base import check_classes
from loraseg.segment.choice import PRESETS, AdaptiveSettings, Mode, preset
from loraseg.segment.pool import AdapterPool, EntryLike
from loraseg.segment.predictor import Predictor
from loraseg.tensor_types import ndarray

__all__ = [
    "PRESETS",
    "AdaptiveSegmenter",
    "AdaptiveSettings",
    "Explanation",
    "Segmentation",
    "UsedAdapter",
    "label_map",
    "preset",
]


@dataclass(frozen=True, slots=True)
class UsedAdapter:
    """One adapter's part in a result; ``distance`` is None where nothing was measured."""

    name: str
    version: int | str
    digest: str
    weight: float
    distance: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an image was segmented as it was.

    Attributes:
        mode: What was asked for.
        base: sha256 of the base model.
        mix: Digest of the fused adapter, None for the bare base.
        adapters: The parts, nearest first.
        fallback: Why the bare base was used although adapters were asked for, else None.
    """

    mode: Mode
    base: str
    mix: str | None
    adapters: tuple[UsedAdapter, ...] = ()
    fallback: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "adapters": [asdict(used) for used in self.adapters]}


@dataclass(frozen=True, slots=True)
class Segmentation:
    """The result for one image.

    Attributes:
        label_map: A class index per pixel (h, w).
        explanation: How it came about.
        scores: Sigmoid scores (classes, h, w) in [0, 1], if asked for.
        confidence: Score of the shown class, float32 (h, w) in [0, 1], if asked for.
        entropy: Of the scores brought to sum one, over log(classes): float32 (h, w) in [0, 1], if
            asked for; 0 where one class has it all, or is the only one.
        tiles: How many overlapping tiles the image was cut into; 1 for none.
    """

    label_map: ndarray
    explanation: Explanation
    scores: ndarray | None = None
    confidence: ndarray | None = None
    entropy: ndarray | None = None
    tiles: int = 1


@runtime_checkable
class ImageEncoder(Protocol):
    """The encoder that the centroids of the library were made with."""

    def encode_images(self, images: Sequence[ndarray]) -> ndarray:
        """Return embeddings (n, d) of uint8 RGB images, not normalised."""
        ...


@dataclass(frozen=True, slots=True)
class _Part:
    entry: EntryLike
    weight: float
    distance: float | None


@dataclass(frozen=True, slots=True)
class _Ready:
    """A batch that has only to go through the model."""

    images: Sequence[ndarray]
    chosen: list[tuple[_Part, ...]]
    mixes: list[Mix | None]


class AdaptiveSegmenter:
    """Segments each image with the adapters nearest to it. One thread at a time."""

    def __init__(
        self,
        predictor: Predictor,
        encoder: ImageEncoder,
        pool: AdapterPool,
        settings: AdaptiveSettings,
    ) -> None:
        self._predictor = predictor
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
        keep_scores: bool = False,
    ) -> list[Segmentation]:
        """Segment images, each with its own mix of adapters.

        Args:
            images: uint8 RGB arrays (h, w, 3); sizes may differ.
            classes: Distinct class names; their order gives the indices of the label maps.
            exclude: Names of adapters that must not be used, for instance in leave-one-out.
            keep_scores: Also return the sigmoid scores (classes, h, w) in [0, 1].

        Returns:
            One result per image. Label maps are uint8 up to 255 classes, else int32; ties go to
            the class named first.

        Raises:
            AdapterMismatchError: A chosen adapter was trained on another base.
            ConfigError: No class is named, one is blank, or one twice.
        """
        check_classes(classes)
        ready = self._prepare(images, exclude)
        return self._run(ready, classes, keep_scores=keep_scores)

    def segment_stream(
        self,
        batches: Iterable[Sequence[ndarray]],
        classes: Sequence[str],
        *,
        exclude: Collection[str] = (),
        keep_scores: bool = False,
    ) -> Generator[list[Segmentation] | LorasegError, None, None]:
        """Segment batch after batch like :meth:`segment`, one batch ahead of itself.

        While a batch is in the model, the next one is taken from ``batches`` (which may decode
        files), embedded, and its adapters are read, in a thread of its own.

        Yields:
            The results of each batch in order, or its error in their place: raising it would end
            the stream for all later ones.

        Raises:
            ConfigError: No class is named, one is blank, or one twice.
        """
        check_classes(classes)
        source = iter(batches)

        def ahead() -> _Ready | LorasegError | None:
            images = next(source, None)
            if images is None:
                return None
            try:
                return self._prepare(images, exclude)
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
                    results = self._run(ready, classes, keep_scores=keep_scores)
                except LorasegError as error:
                    yield error
                    continue
                yield results

    def _prepare(self, images: Sequence[ndarray], exclude: Collection[str]) -> "_Ready":
        """Embed, retrieve and read adapters: all that does not need the segmenter."""
        with torch.cuda.stream(self._stream):
            chosen = self._choose(images, exclude)
        return _Ready(images, chosen, [self._fuse(parts) for parts in chosen])

    def _run(
        self, ready: "_Ready", classes: Sequence[str], *, keep_scores: bool
    ) -> list[Segmentation]:
        maps = self._predictor.predict(ready.images, classes, ready.mixes)
        return [
            Segmentation(
                label_map=label_map(scores),
                explanation=self._explain(parts, mix),
                scores=scores.numpy() if keep_scores else None,
            )
            for scores, parts, mix in zip(maps, ready.chosen, ready.mixes, strict=True)
        ]

    def _choose(
        self, images: Sequence[ndarray], exclude: Collection[str]
    ) -> list[tuple[_Part, ...]]:
        mode, retriever = self._settings.mode, self._pool.retriever
        if mode == "uniform":
            rest = [entry for entry in self._pool.entries if entry.name not in exclude]
            return [tuple(_Part(entry, 1.0 / len(rest), None) for entry in rest)] * len(images)
        if mode == "base" or retriever is None or not images:
            return [()] * len(images)
        embeddings = self._encoder.encode_images(images)
        k, temperature = self._settings.k, self._settings.temperature
        found = retriever.retrieve_batch(embeddings, k, temperature, exclude=exclude)
        return [tuple(_Part(n.entry, n.weight, n.distance) for n in near) for near in found]

    def _fuse(self, parts: Sequence[_Part]) -> Mix | None:
        if not parts:
            return None
        adapters = [self._pool.load(part.entry) for part in parts]
        base = self._predictor.base.digest
        for part, adapter in zip(parts, adapters, strict=True):
            if adapter.base_digest not in (None, base):
                raise AdapterMismatchError(
                    f"adapter {part.entry.name!r} was trained on base {adapter.base_digest}, "
                    f"expected {base}"
                )
        return fuse(adapters, [part.weight for part in parts])

    def _explain(self, parts: Sequence[_Part], mix: Mix | None) -> Explanation:
        fallback = None
        if not parts and self._settings.mode != "base":
            fallback = "every adapter was excluded" if self._pool.entries else self._pool.vacancy
        return Explanation(
            mode=self._settings.mode,
            base=self._predictor.base.digest,
            mix=mix.digest if mix else None,
            adapters=tuple(
                UsedAdapter(
                    part.entry.name,
                    part.entry.version,
                    part.entry.digest,
                    float(part.weight),
                    None if part.distance is None else float(part.distance),
                )
                for part in parts
            ),
            fallback=fallback,
        )


def label_map(scores: Any) -> ndarray:
    """Return the class of the largest score per pixel for a tensor (t, h, w); first on ties."""
    kind = np.uint8 if scores.shape[0] <= 255 else np.int32
    # numpy's argmax names the first of equal values; torch leaves the choice open.
    return scores.cpu().numpy().argmax(axis=0).astype(kind)
