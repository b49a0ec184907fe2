"""Leave-one-out: score every way of using a library on a domain whose own adapter is left out.

The methods are those of methods B.6: zero-shot (no adapter), uniform (all others with 1/N each),
SemLA (K nearest per image), late fusion of both (each adapter alone, sigmoid maps combined) and
the oracle (the domain's own adapter).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from loraseg.adapters.packed import PackedAdapter
from loraseg.data.datasets import Sample
from loraseg.errors import ConfigError, DatasetError
from loraseg.evaluate.tuning import Hyperparameters, mixing_weight_matrix
from loraseg.fuse.late import LateFusion
from loraseg.fuse.mix import Mix, fuse
from loraseg.inference.adapter_ref import AdapterEntry
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.segment.open_vocabulary.base import SegmentationBase
from loraseg.segment.open_vocabulary.pixel_maps import label_map
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.tensor_types import Float, Tensor, ndarray

__all__ = [
    "METHODS",
    "EvaluationContext",
    "MethodScore",
    "ScoredExample",
    "ScoringConfig",
    "TargetDomain",
    "TargetScorer",
    "TargetScores",
]

Method = Literal["zero_shot", "uniform", "semla", "late_uniform", "late_semla", "oracle"]
METHODS: tuple[Method, ...] = (
    "zero_shot",
    "uniform",
    "semla",
    "late_uniform",
    "late_semla",
    "oracle",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """How images are scored; the same for every method.

    Attributes:
        predict: Whole image or sliding windows (methods A.7).
        text_cache: ``first_image`` keeps the text features of a domain's first mix for all its
            images, as the published numbers do; ``per_adapter`` computes them for every mix.
        late: Also score late fusion, at one forward pass per adapter and image.
        batch_size: Images of a domain that go through the model together.
        examples: Images per domain kept with all predictions, for the report.
    """

    predict: Literal["plain", "sliding"] = "plain"
    text_cache: Literal["per_adapter", "first_image"] = "per_adapter"
    late: bool = True
    batch_size: int = 8
    examples: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.examples < 0:
            raise ConfigError(
                f"batch_size {self.batch_size}, examples {self.examples}: expected at least 1 and 0"
            )


@dataclass(frozen=True, slots=True)
class EvaluationContext:
    """What all domains are scored with.

    Attributes:
        base: The frozen segmenter.
        entries: The library's adapters that fit it; the columns of ``measure_distances``.
        load_adapter: Gives the weights of an entry.
        measure_distances: Euclidean distances (images, entries) of uint8 images to the entries'
            domains.
        candidates: Names that may be mixed for other domains; None for all.
    """

    base: SegmentationBase
    entries: Sequence[AdapterEntry]
    load_adapter: Callable[[Any], PackedAdapter]
    measure_distances: Callable[[Sequence[ndarray]], ndarray]
    candidates: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class TargetDomain:
    """A domain to score on; its own adapter is the entry of the same name."""

    name: str
    family: str
    classes: tuple[str, ...]
    samples: Sequence[Sample]
    load: Callable[[Sample], tuple[ndarray, ndarray]]
    digest: str = ""


@dataclass(frozen=True, slots=True)
class MethodScore:
    """IoU per class in [0, 1], None where the class is absent, and their mean."""

    miou: float
    iou: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class ScoredExample:
    """One image with its mask and the label map of every method.

    ``retrieved`` are the adapters that SemLA fused, (name, weight, distance), heaviest first.
    """

    sample: str
    image: ndarray
    label: ndarray
    predictions: dict[Method, ndarray]
    retrieved: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True, slots=True)
class TargetScores:
    """All scores of one domain; weights and distances are means over its images."""

    name: str
    family: str
    classes: tuple[str, ...]
    images: int
    data_digest: str
    setting: Hyperparameters
    methods: dict[Method, MethodScore]
    weights: dict[str, float]
    distances: dict[str, float]
    examples: tuple[ScoredExample, ...] = field(default=(), repr=False)


class TargetScorer:
    """Scores one domain. The base is not changed; nothing is kept between domains."""

    def __init__(
        self, context: EvaluationContext, target: TargetDomain, scoring: ScoringConfig
    ) -> None:
        self._context, self._target, self._scoring = context, target, scoring
        allowed = context.candidates
        self._columns = [
            column
            for column, entry in enumerate(context.entries)
            if entry.name != target.name and (allowed is None or entry.name in allowed)
        ]
        if not self._columns:
            raise ConfigError(
                f"domain {target.name!r}: no other adapter is left to mix; "
                f"the library has {', '.join(e.name for e in context.entries) or 'none'}"
            )
        self._other_entries = [context.entries[column] for column in self._columns]
        self._own_entry = next((e for e in context.entries if e.name == target.name), None)
        self._cached_predictor = Predictor(context.base, mode=scoring.predict)

    def score_grid(
        self, combinations: Sequence[Hyperparameters], images: int | None = None
    ) -> list[float]:
        """Return SemLA's mIoU in [0, 1] for every setting, on the first ``images`` images.

        An image is embedded once, and settings that give it equal weights share a forward pass.
        """
        counts = [ConfusionMatrix(len(self._target.classes)) for _ in combinations]
        predictors = {setting: self._per_image_predictor() for setting in combinations}
        shared = self._scoring.text_cache == "per_adapter"
        for pictures, masks, _ in self._batches(self._target.samples[:images]):
            distances = self._distances(pictures)
            rows = [mixing_weight_matrix(distances, setting) for setting in combinations]
            seen: dict[tuple[int, bytes], ndarray] = {}
            for setting, weights, count in zip(combinations, rows, counts, strict=True):
                if not shared:
                    # With the first image's text, equal weights on this image do not make equal
                    # predictions: the text stems from another image, weighed by the setting.
                    seen.clear()
                keys = [(index, row.tobytes()) for index, row in enumerate(weights)]
                new = [index for index, key in enumerate(keys) if key not in seen]
                scores = predictors[setting].predict(
                    [pictures[index] for index in new],
                    self._target.classes,
                    [self._fuse_weighted(weights[index]) for index in new],
                )
                seen |= {keys[i]: label_map(one) for i, one in zip(new, scores, strict=True)}
                for mask, key in zip(masks, keys, strict=True):
                    count.add(mask, seen[key])
        return [count.miou() for count in counts]

    def score_methods(self, setting: Hyperparameters) -> TargetScores:
        """Score every method with K and tau of ``setting``."""
        target = self._target
        counts: dict[Method, ConfusionMatrix] = {
            method: ConfusionMatrix(len(target.classes)) for method in self._methods()
        }
        per_image = self._per_image_predictor()
        all_weights: list[ndarray] = []
        all_distances: list[ndarray] = []
        examples: list[ScoredExample] = []
        for pictures, masks, names in self._batches(target.samples):
            distances = self._distances(pictures)
            weights = mixing_weight_matrix(distances, setting)
            predictions = self._predict(pictures, weights, per_image)
            for method, maps in predictions.items():
                for mask, predicted in zip(masks, maps, strict=True):
                    counts[method].add(mask, predicted)
            for index in range(min(len(pictures), self._scoring.examples - len(examples))):
                examples.append(
                    ScoredExample(
                        names[index],
                        pictures[index],
                        masks[index],
                        {method: maps[index] for method, maps in predictions.items()},
                        self._retrieved(weights[index], distances[index]),
                    )
                )
            all_weights.append(weights)
            all_distances.append(distances)
        return TargetScores(
            name=target.name,
            family=target.family,
            classes=target.classes,
            images=len(target.samples),
            data_digest=target.digest,
            setting=setting,
            methods={method: _method_score(count) for method, count in counts.items()},
            weights=self._by_name(np.concatenate(all_weights).mean(axis=0)),
            distances=self._by_name(np.concatenate(all_distances).mean(axis=0)),
            examples=tuple(examples),
        )

    def _methods(self) -> list[Method]:
        left_out: set[Method] = set()
        if not self._scoring.late:
            left_out |= {"late_uniform", "late_semla"}
        if self._own_entry is None:
            left_out.add("oracle")
        return [method for method in METHODS if method not in left_out]

    def _predict(
        self,
        pictures: list[ndarray],
        weights: Float[ndarray, "images others"],
        per_image: Predictor,
    ) -> dict[Method, list[ndarray]]:
        """Return the label maps of every method for a batch of images."""
        classes, count = self._target.classes, len(self._other_entries)
        maps: dict[Method, list[Tensor]] = {
            "zero_shot": self._cached_predictor.predict(pictures, classes, None),
            "uniform": self._cached_predictor.predict(
                pictures, classes, self._fuse_weighted(np.full(count, 1.0 / count))
            ),
            "semla": per_image.predict(
                pictures, classes, [self._fuse_weighted(row) for row in weights]
            ),
        }
        if self._own_entry is not None:
            own = fuse([self._context.load_adapter(self._own_entry)], [1.0])
            maps["oracle"] = self._cached_predictor.predict(pictures, classes, own)
        if self._scoring.late:
            maps["late_uniform"], maps["late_semla"] = self._late_fusion(pictures, weights)
        return {
            method: [label_map(scores) for scores in maps[method]] for method in self._methods()
        }

    def _late_fusion(
        self, pictures: list[ndarray], weights: Float[ndarray, "images others"]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the uniform and the weighted sum of the adapters' own sigmoid maps.

        Both sums grow while the adapters pass by, so memory does not depend on their number.
        """
        uniform = [LateFusion() for _ in pictures]
        weighted = [LateFusion() for _ in pictures]
        for column, entry in enumerate(self._other_entries):
            alone = fuse([self._context.load_adapter(entry)], [1.0])
            maps = self._cached_predictor.predict(pictures, self._target.classes, alone)
            for index, scores in enumerate(maps):
                uniform[index].add(scores, 1.0 / len(self._other_entries))
                weighted[index].add(scores, float(weights[index, column]))
        return [late.total for late in uniform], [late.total for late in weighted]

    def _fuse_weighted(self, weights: Float[ndarray, " others"]) -> Mix:
        used = np.flatnonzero(weights)
        return fuse(
            [self._context.load_adapter(self._other_entries[column]) for column in used],
            weights[used],
        )

    def _distances(self, pictures: Sequence[ndarray]) -> Float[ndarray, "images others"]:
        return self._context.measure_distances(pictures)[:, self._columns]

    def _per_image_predictor(self) -> Predictor:
        # A fresh one per domain: with the first image's text it must not know another domain.
        return self._cached_predictor.with_text_cache(self._scoring.text_cache)

    def _by_name(self, values: Float[ndarray, " others"]) -> dict[str, float]:
        return {
            entry.name: float(value)
            for entry, value in zip(self._other_entries, values, strict=True)
        }

    def _retrieved(
        self, weights: Float[ndarray, " others"], distances: Float[ndarray, " others"]
    ) -> tuple[tuple[str, float, float], ...]:
        order = [column for column in np.argsort(-weights, kind="stable") if weights[column] > 0]
        return tuple(
            (self._other_entries[column].name, float(weights[column]), float(distances[column]))
            for column in order
        )

    def _batches(
        self, samples: Sequence[Sample]
    ) -> Iterator[tuple[list[ndarray], list[ndarray], list[str]]]:
        if not samples:
            raise DatasetError(f"domain {self._target.name!r}: no images to score")
        size = self._scoring.batch_size
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            loaded = [self._target.load(sample) for sample in chunk]
            yield (
                [image for image, _ in loaded],
                [mask for _, mask in loaded],
                [sample.id for sample in chunk],
            )


def _method_score(count: ConfusionMatrix) -> MethodScore:
    iou = tuple(None if np.isnan(value) else float(value) for value in count.iou())
    return MethodScore(miou=float(count.miou()), iou=iou)
