"""The half of adaptive segmentation that needs the model: fuse -> segment (methods B.5)."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loraseg.adapters.packed import PackedAdapter
from loraseg.errors import AdapterMismatchError, ConfigError, IntegrityError
from loraseg.fuse.mix import Mix, fuse
from loraseg.inference.adapter_cache import AdapterEntry, load_each
from loraseg.inference.selection import AdapterMode, AdapterSelection
from loraseg.segment.open_vocabulary.pixel_maps import PixelMaps, pixel_maps
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.tiled_inference import segment_tiled, tile_count
from loraseg.tensor_types import Tensor, ndarray

__all__ = ["AdapterContribution", "Explanation", "SegmentJob", "SegmentRunner", "Segmentation"]


@dataclass(frozen=True, slots=True)
class AdapterContribution:
    """One adapter's part in a result.

    Attributes:
        name: Of the chosen entry.
        version: Of the chosen entry.
        digest: sha256 of the weight files that were used.
        weight: Mixing weight.
        distance: From the image to the adapter's domain; None where nothing was measured.
    """

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

    mode: AdapterMode
    base: str
    mix: str | None
    adapters: tuple[AdapterContribution, ...] = ()
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentJob:
    """One image that has only to go through the model.

    Attributes:
        image: RGB, uint8 (h, w, 3).
        selection: Which adapters were chosen.
        mix: Those adapters, as :meth:`Runner.fuse` gives them.
        maps: Any of ``confidence`` and ``entropy``.
        keep_scores: Also return the scores. Not for tiled images, which never have them whole.
    """

    image: ndarray
    selection: AdapterSelection
    mix: Mix | None
    maps: frozenset[str] = field(default_factory=frozenset[str])
    keep_scores: bool = False


class SegmentRunner:
    """Fuses chosen adapters and runs images through the model with them."""

    def __init__(self, predictor: Predictor, load: Callable[[Any], PackedAdapter]) -> None:
        """Run on ``predictor``, whose base all adapters must fit; ``load`` gives an entry's."""
        self.predictor = predictor
        self._load = load

    def fuse(self, selection: AdapterSelection) -> Mix | None:
        """Load the chosen adapters and weigh them; None for the bare base. From any thread.

        Raises:
            UnusableAdaptersError: Some cannot be loaded, are for another base, or are not those
                that were chosen; all were tried.
        """
        if not selection.adapters:
            return None
        adapters = load_each([part.entry for part in selection.adapters], self._load_checked)
        return fuse(adapters, [part.weight for part in selection.adapters])

    def run(self, jobs: Sequence[SegmentJob], classes: Sequence[str]) -> list[Segmentation]:
        """Segment images together. One thread at a time.

        Args:
            jobs: Sizes, mixes and maps may differ.
            classes: Distinct names; their order gives the indices of the label maps.

        Raises:
            AdapterMismatchError: A mix does not fit the model.
            ConfigError: No class is named, one is blank or one twice, or a map is unknown.
            DatasetError: An image is not uint8 RGB.
        """
        images, mixes = [job.image for job in jobs], [job.mix for job in jobs]
        scores = self.predictor.predict(images, classes, mixes)
        return [
            self._to_segmentation(
                job, pixel_maps(one, job.maps), scores=one if job.keep_scores else None
            )
            for job, one in zip(jobs, scores, strict=True)
        ]

    def run_tiled(
        self, job: SegmentJob, classes: Sequence[str]
    ) -> Generator[None, None, Segmentation]:
        """Segment a large image by overlapping tiles, in bounded memory. One thread at a time.

        Yields after every batch of tiles, so that the caller may run other images between them, or
        give up by closing the generator. The result is what it returns.

        Raises:
            AdapterMismatchError: The mix does not fit the model.
            ConfigError: As :meth:`run`, or scores are wanted.
            DatasetError: The image is not uint8 RGB.
        """
        if job.keep_scores:
            raise ConfigError(
                f"keep_scores: an image of {job.image.shape[:2]} pixels goes through in tiles and "
                "its scores are never there as a whole; expected tiling 'never'"
            )
        maps = yield from segment_tiled(self.predictor, job.image, classes, job.mix, job.maps)
        height, width = job.image.shape[:2]
        return self._to_segmentation(job, maps, tiles=tile_count(height, width, self.predictor))

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

    def _to_segmentation(
        self, job: SegmentJob, maps: PixelMaps, *, tiles: int = 1, scores: Tensor | None = None
    ) -> Segmentation:
        return Segmentation(
            label_map=maps.label_map,
            explanation=self._explain(job),
            scores=None if scores is None else scores.numpy(),
            confidence=maps.confidence,
            entropy=maps.entropy,
            tiles=tiles,
        )

    def _explain(self, job: SegmentJob) -> Explanation:
        mixed = job.mix.parts if job.mix else ()
        return Explanation(
            mode=job.selection.mode,
            base=self.predictor.base.digest,
            mix=job.mix.digest if job.mix else None,
            adapters=tuple(
                AdapterContribution(
                    part.entry.name, part.entry.version, adapter.digest, weight, part.distance
                )
                for part, (adapter, weight) in zip(job.selection.adapters, mixed, strict=True)
            ),
            fallback=job.selection.fallback,
        )
