"""Leave-one-out: score every method on a domain whose own adapter is left out of the library."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from loraseg.adapters.packed import PackedAdapter
from loraseg.data.datasets import Sample
from loraseg.errors import ConfigError, DatasetError
from loraseg.evaluate.methods import METHODS, AdapterSet, ImageBatch, Method
from loraseg.evaluate.tuning import Hyperparameters, mixing_weight_matrix
from loraseg.inference.adapter_ref import AdapterEntry
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.segment.open_vocabulary.pixel_maps import label_map
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.protocol import OpenVocabularyBase
from loraseg.tensor_types import Float, UInt8, ndarray

__all__ = [
    "EvaluationContext",
    "MethodScore",
    "ScoredExample",
    "ScoringConfig",
    "TargetDomain",
    "TargetScorer",
    "TargetScores",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """How images are scored; the same for every method.

    Attributes:
        predict: "plain" for whole images, "sliding" for CAT-Seg's sliding windows (its
            ``cat_seg_model.py: inference_sliding_window``).
        text_cache: "per_adapter" computes text features for every mix. "first_image" reuses those
            of a domain's first mix for all its images, as SemLA's code and published scores do.
        late: Also score late fusion, which costs one forward pass per adapter and image.
        batch_size: Images of a domain per forward pass.
        examples: Images per domain kept with all predictions, for the report.

    Raises:
        ConfigError: ``batch_size`` is below 1, or ``examples`` is negative.
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
    """The models and the library with which all domains are scored.

    Attributes:
        base: The frozen segmenter.
        entries: The library's adapters that fit the base; the columns of ``measure_distances``.
        load_adapter: Returns the weights of an entry.
        measure_distances: Returns the Euclidean distances, (images, entries), of RGB uint8 images
            to the entries' centroids.
        candidates: Names of the adapters that may be mixed for other domains; None for all.
    """

    base: OpenVocabularyBase
    entries: Sequence[AdapterEntry]
    load_adapter: Callable[[Any], PackedAdapter]
    measure_distances: Callable[[Sequence[ndarray]], ndarray]
    candidates: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class TargetDomain:
    """A domain to score on.

    Attributes:
        name: Name of the domain and of its own adapter.
        family: Related domains have the same family.
        classes: Class names.
        samples: The labelled images.
        load: Returns image and label map, (h, w, 3) and (h, w) uint8, of a sample.
        digest: Identifies the content of ``samples``.
    """

    name: str
    family: str
    classes: tuple[str, ...]
    samples: Sequence[Sample]
    load: Callable[[Sample], tuple[ndarray, ndarray]]
    digest: str = ""


@dataclass(frozen=True, slots=True)
class MethodScore:
    """mIoU and the IoU per class, in [0, 1]; None for a class that is absent."""

    miou: float
    iou: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class ScoredExample:
    """An image with its label map and the prediction of every method.

    Attributes:
        sample: Id of the image.
        image: RGB.
        label: Class ids, 255 = ignore.
        predictions: Class ids by method, of the size of ``label``.
        retrieved: (name, weight, distance) of the adapters in SemLA's mix, heaviest first.
    """

    sample: str
    image: UInt8[ndarray, "h w 3"]
    label: UInt8[ndarray, "h w"]
    predictions: dict[Method, ndarray]
    retrieved: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True, slots=True)
class TargetScores:
    """All scores of one domain.

    Attributes:
        name: Name of the domain.
        family: Family of the domain.
        classes: Class names.
        images: Number of images.
        data_digest: Identifies the images and labels.
        setting: K and tau of SemLA.
        methods: Scores by method.
        weights: Mean mixing weight over the images, by adapter.
        distances: Mean distance over the images, by adapter.
        examples: Images with all predictions.
    """

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
    """Scores one domain without changing the base.

    Raises:
        ConfigError: The library has no adapter of another domain.
    """

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
        others = [context.entries[column] for column in self._columns]
        own = [entry for entry in context.entries if entry.name == target.name][:1]
        self._others = AdapterSet(others, context.load_adapter)
        self._own = AdapterSet(own, context.load_adapter)
        self._predictor = Predictor(context.base, mode=scoring.predict)

    def score_grid(
        self, combinations: Sequence[Hyperparameters], images: int | None = None
    ) -> list[float]:
        """Return SemLA's mIoU in [0, 1] of every combination, on the first ``images`` images.

        Each image is embedded once. Combinations that give an image the same weights share one
        forward pass.

        Raises:
            DatasetError: There are no images, or an image has no label.
        """
        counts = [ConfusionMatrix(len(self._target.classes)) for _ in combinations]
        predictors = [self._per_image_predictor() for _ in combinations]
        share_predictions = self._scoring.text_cache == "per_adapter"
        for batch, labels, _ in self._batches(self._target.samples[:images]):
            distances = self._distances(batch)
            predicted: dict[tuple[int, bytes], ndarray] = {}
            for combination, predictor, count in zip(combinations, predictors, counts, strict=True):
                if not share_predictions:
                    # The text features stem from the first image's mix, which depends on the
                    # combination: equal weights do not give equal predictions.
                    predicted.clear()
                weights = mixing_weight_matrix(distances, combination)
                keys = [(index, row.tobytes()) for index, row in enumerate(weights)]
                new = [index for index, key in enumerate(keys) if key not in predicted]
                scores = predictor.predict(
                    [batch[index] for index in new],
                    self._target.classes,
                    [self._others.mix(weights[index]) for index in new],
                )
                predicted |= {
                    keys[index]: label_map(maps) for index, maps in zip(new, scores, strict=True)
                }
                for label, key in zip(labels, keys, strict=True):
                    count.add(label, predicted[key])
        return [count.miou() for count in counts]

    def score_methods(self, setting: Hyperparameters) -> TargetScores:
        """Score every method, SemLA with K and tau of ``setting``.

        Raises:
            DatasetError: There are no images, or an image has no label.
        """
        target = self._target
        counts: dict[Method, ConfusionMatrix] = {
            method: ConfusionMatrix(len(target.classes)) for method in self._methods()
        }
        per_image_predictor = self._per_image_predictor()
        all_weights: list[ndarray] = []
        all_distances: list[ndarray] = []
        examples: list[ScoredExample] = []
        for images, labels, ids in self._batches(target.samples):
            distances = self._distances(images)
            weights = mixing_weight_matrix(distances, setting)
            predictions = self._predict(images, weights, per_image_predictor)
            for method, maps in predictions.items():
                for label, predicted in zip(labels, maps, strict=True):
                    counts[method].add(label, predicted)
            for index in range(min(len(images), self._scoring.examples - len(examples))):
                examples.append(
                    ScoredExample(
                        ids[index],
                        images[index],
                        labels[index],
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
        return [
            name
            for name, method in METHODS.items()
            if (self._scoring.late or not method.is_late)
            and (self._own.entries or not method.needs_own_adapter)
        ]

    def _predict(
        self,
        images: list[ndarray],
        weights: Float[ndarray, "images others"],
        per_image_predictor: Predictor,
    ) -> dict[Method, list[ndarray]]:
        """Return the (h, w) label maps of every method for a batch of images."""
        batch = ImageBatch(
            images=images,
            classes=self._target.classes,
            others=self._others,
            own=self._own,
            weights=weights,
            predictor=self._predictor,
            per_image_predictor=per_image_predictor,
        )
        return {
            method: [label_map(scores) for scores in METHODS[method].predict(batch)]
            for method in self._methods()
        }

    def _distances(self, images: Sequence[ndarray]) -> Float[ndarray, "images others"]:
        return self._context.measure_distances(images)[:, self._columns]

    def _per_image_predictor(self) -> Predictor:
        # Each domain has its own predictor: a cache of the first image's text features must not
        # outlive the domain.
        return self._predictor.with_text_cache(self._scoring.text_cache)

    def _by_name(self, values: Float[ndarray, " others"]) -> dict[str, float]:
        return {
            entry.name: float(value)
            for entry, value in zip(self._others.entries, values, strict=True)
        }

    def _retrieved(
        self, weights: Float[ndarray, " others"], distances: Float[ndarray, " others"]
    ) -> tuple[tuple[str, float, float], ...]:
        order = [column for column in np.argsort(-weights, kind="stable") if weights[column] > 0]
        return tuple(
            (self._others.entries[column].name, float(weights[column]), float(distances[column]))
            for column in order
        )

    def _batches(
        self, samples: Sequence[Sample]
    ) -> Iterator[tuple[list[ndarray], list[ndarray], list[str]]]:
        """Yield images, label maps and ids."""
        if not samples:
            raise DatasetError(f"domain {self._target.name!r}: no images to score")
        size = self._scoring.batch_size
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            loaded = [self._target.load(sample) for sample in chunk]
            yield (
                [image for image, _ in loaded],
                [label for _, label in loaded],
                [sample.id for sample in chunk],
            )


def _method_score(count: ConfusionMatrix) -> MethodScore:
    iou = tuple(None if np.isnan(value) else float(value) for value in count.iou())
    return MethodScore(miou=float(count.miou()), iou=iou)
