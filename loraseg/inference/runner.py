"""Fuse the selected adapters of images and segment them; SemLA's concatenation-based fusion."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from loraseg.adapters.packed import PackedAdapter
from loraseg.errors import AdapterMismatchError, ConfigError, IntegrityError
from loraseg.fuse.mix import Mix, fuse
from loraseg.inference.adapter_cache import load_each
from loraseg.inference.adapter_ref import AdapterEntry
from loraseg.inference.request import (
    AdapterContribution,
    Explanation,
    SegmentRequest,
    SegmentResult,
)
from loraseg.inference.selection import AdapterSelection
from loraseg.segment.open_vocabulary.pixel_maps import PixelMaps, pixel_maps
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.tiled_inference import segment_tiled, tile_count
from loraseg.tensor_types import Tensor

__all__ = ["SegmentRunner"]


class SegmentRunner:
    """Fuses selected adapters and runs images through the model with them."""

    def __init__(self, predictor: Predictor, load: Callable[[Any], PackedAdapter]) -> None:
        """Run on ``predictor``, whose base all adapters must fit; ``load`` reads an entry's."""
        self.predictor = predictor
        self._load = load

    def fuse(self, selection: AdapterSelection) -> Mix | None:
        """Load the selected adapters and mix them; None for the bare base. Thread-safe.

        Raises:
            AdapterUnavailableError: Some cannot be loaded, were trained on another base, or differ
                from their digest. It lists all of them.
        """
        if not selection.adapters:
            return None
        adapters = load_each([part.entry for part in selection.adapters], self._load_checked)
        return fuse(adapters, [part.weight for part in selection.adapters])

    def run(
        self, requests: Sequence[SegmentRequest], mixes: Sequence[Mix | None]
    ) -> list[SegmentResult]:
        """Segment images in one pass. Not thread-safe.

        Args:
            requests: All with the same classes, each with its selection. Image sizes and maps may
                differ.
            mixes: The fused adapters of each request, from :meth:`fuse`.

        Raises:
            AdapterMismatchError: A mix does not fit the model.
            ConfigError: The classes are empty, blank or repeated, or a map is unknown.
            DatasetError: An image is not uint8 RGB.
        """
        if not requests:
            return []
        images = [request.image for request in requests]
        all_scores = self.predictor.predict(images, requests[0].classes, mixes)
        return [
            self._to_result(
                request,
                mix,
                pixel_maps(scores, request.maps),
                scores=scores if request.keep_scores else None,
                batch_size=len(requests),
            )
            for request, mix, scores in zip(requests, mixes, all_scores, strict=True)
        ]

    def run_tiled(
        self, request: SegmentRequest, mix: Mix | None
    ) -> Generator[None, None, SegmentResult]:
        """Segment a large image by overlapping tiles, in bounded memory. Not thread-safe.

        Yields after every batch of tiles, so that the caller can run other images between them, or
        stop by closing the generator. The result is the generator's return value.

        Raises:
            AdapterMismatchError: The mix does not fit the model.
            ConfigError: As :meth:`run`, or ``keep_scores`` is set.
            DatasetError: The image is not uint8 RGB.
        """
        if request.keep_scores:
            raise ConfigError(
                f"keep_scores: an image of {request.image.shape[:2]} pixels is segmented in tiles "
                "and its scores never exist as a whole; expected tiling 'never'"
            )
        maps = yield from segment_tiled(
            self.predictor, request.image, request.classes, mix, request.maps
        )
        height, width = request.image.shape[:2]
        tiles = tile_count(height, width, self.predictor)
        return self._to_result(request, mix, maps, tiles=tiles)

    def _load_checked(self, entry: AdapterEntry) -> PackedAdapter:
        adapter, base = self._load(entry), self.predictor.base.digest
        if adapter.base_digest not in (None, base):
            raise AdapterMismatchError(
                f"adapter {entry.name!r} was trained on base {adapter.base_digest}, expected {base}"
            )
        if adapter.digest != entry.digest:
            raise IntegrityError(
                f"adapter {entry.name!r}: got files with digest {adapter.digest}, expected "
                f"{entry.digest}"
            )
        return adapter

    def _to_result(
        self,
        request: SegmentRequest,
        mix: Mix | None,
        maps: PixelMaps,
        *,
        scores: Tensor | None = None,
        tiles: int = 1,
        batch_size: int = 1,
    ) -> SegmentResult:
        selection = _selection(request)
        return SegmentResult(
            label_map=maps.label_map,
            explanation=self._explain(selection, mix),
            scores=None if scores is None else scores.numpy(),
            confidence=maps.confidence,
            entropy=maps.entropy,
            tiles=tiles,
            generation=selection.generation,
            skipped=selection.skipped,
            timing_ms=selection.timing_ms,
            batch_size=batch_size,
        )

    def _explain(self, selection: AdapterSelection, mix: Mix | None) -> Explanation:
        mixed = mix.parts if mix else ()
        return Explanation(
            mode=selection.mode,
            base=self.predictor.base.digest,
            mix=mix.digest if mix else None,
            adapters=tuple(
                AdapterContribution(
                    part.entry.name, part.entry.version, adapter.digest, weight, part.distance
                )
                for part, (adapter, weight) in zip(selection.adapters, mixed, strict=True)
            ),
            fallback=selection.fallback,
        )


def _selection(request: SegmentRequest) -> AdapterSelection:
    if request.selection is None:
        raise ValueError("selection: got None, expected the adapters that retrieval chose")
    return request.selection
