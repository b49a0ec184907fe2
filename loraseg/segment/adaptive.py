"""Segment with adapters chosen for each image: embed -> retrieve -> fuse -> segment.

The method is SemLA's (methods B.4 and B.5).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from loraseg.adapters.adapter import Mix
from loraseg.errors import AdapterMismatchError, ConfigError
from loraseg.fuse.concat import fuse
from loraseg.segment.base import check_classes
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

Mode = Literal["fused", "uniform", "base"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveSettings:
    """How adapters are chosen for an image.

    Attributes:
        k: Number of nearest adapters that are fused, K of methods B.4.
        temperature: tau of methods B.4; it belongs to the encoder's scale of distances.
        mode: ``fused`` retrieves per image, ``uniform`` mixes all adapters with equal weights,
            ``base`` uses none.
    """

    k: int = 5
    temperature: float = 0.05
    mode: Mode = "fused"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k: got {self.k}, expected at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature: got {self.temperature}, expected a finite number above 0"
            )


# The same sharpness of 1/(d tau) needs another tau where distances have another scale.
PRESETS: Mapping[str, AdaptiveSettings] = {
    "semla": AdaptiveSettings(k=5, temperature=0.05),
    "miniature": AdaptiveSettings(k=2, temperature=0.04),
}


def preset(encoder: str) -> AdaptiveSettings:
    """Return the settings that go with an index encoder; SemLA's own where nothing is known."""
    return PRESETS.get(encoder, PRESETS["semla"])


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
    """The result for one image: a class index per pixel (h, w) and how it came about."""

    label_map: ndarray
    explanation: Explanation
    scores: ndarray | None = None


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
        chosen = self._choose(images, exclude)
        mixes = [self._fuse(parts) for parts in chosen]
        # Images with the same mix share one forward pass.
        groups: dict[str | None, list[int]] = {}
        for index, mix in enumerate(mixes):
            groups.setdefault(mix.digest if mix else None, []).append(index)
        results: dict[int, Segmentation] = {}
        for members in groups.values():
            batch = [images[index] for index in members]
            maps = self._predictor.predict(batch, classes, mixes[members[0]])
            for index, scores in zip(members, maps, strict=True):
                results[index] = Segmentation(
                    label_map=label_map(scores),
                    explanation=self._explain(chosen[index], mixes[index]),
                    scores=scores.cpu().numpy() if keep_scores else None,
                )
        return [results[index] for index in range(len(images))]

    def _choose(
        self, images: Sequence[ndarray], exclude: Collection[str]
    ) -> list[tuple[_Part, ...]]:
        mode, retriever = self._settings.mode, self._pool.retriever
        if mode == "uniform":
            rest = [entry for entry in self._pool.entries if entry.name not in exclude]
            return [tuple(_Part(entry, 1.0 / len(rest), None) for entry in rest)] * len(images)
        if mode == "base" or retriever is None or not images:
            return [()] * len(images)
        found = [
            retriever.retrieve(e, self._settings.k, self._settings.temperature, exclude=exclude)
            for e in self._encoder.encode_images(images)
        ]
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
