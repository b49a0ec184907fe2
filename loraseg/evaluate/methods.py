"""The methods that an evaluation compares, in one table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from loraseg.adapters.packed import PackedAdapter
from loraseg.fuse.late import LateFusion
from loraseg.fuse.mix import Mix, fuse
from loraseg.inference.adapter_ref import AdapterEntry
from loraseg.inference.selection import AdapterMode
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.tensor_types import Float, Tensor, UInt8, ndarray

__all__ = ["METHODS", "AdapterSet", "EvaluationMethod", "ImageBatch", "Method", "Paper"]

Method = Literal["zero_shot", "uniform", "semla", "late_uniform", "late_semla", "oracle"]


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """Adapters that may be mixed for a domain; the columns of its weights.

    Attributes:
        entries: The adapters.
        load: Returns the weights of an entry.
    """

    entries: Sequence[AdapterEntry]
    load: Callable[[Any], PackedAdapter]

    def mix(self, weights: Float[ndarray, " adapters"]) -> Mix:
        """Return the weighted sum of the adapters whose weight is not zero."""
        used = np.flatnonzero(weights)
        return fuse([self.load(self.entries[int(column)]) for column in used], weights[used])

    def single(self, column: int) -> Mix:
        """Return one adapter at full weight."""
        return fuse([self.load(self.entries[column])], [1.0])


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images of a domain and the adapters that a method may use for them.

    Attributes:
        images: RGB images; their sizes may differ.
        classes: Class names of the domain.
        others: The adapters of the other domains.
        own: The domain's own adapter; an empty set if there is none.
        weights: SemLA's mixing weights of ``others`` for every image.
        predictor: Predicts with one mix for all images.
        per_image_predictor: Predicts with one mix per image; its text cache is that of the domain.
    """

    images: Sequence[UInt8[ndarray, "_ _ 3"]]
    classes: tuple[str, ...]
    others: AdapterSet
    own: AdapterSet
    weights: Float[ndarray, "images others"]
    predictor: Predictor
    per_image_predictor: Predictor

    def predict(self, mix: Mix | None) -> list[Tensor]:
        """Return the (c, h, w) scores of every image with the same mix; None for no adapter."""
        return self.predictor.predict(self.images, self.classes, mix)

    @cached_property
    def late_fusion(self) -> tuple[list[Tensor], list[Tensor]]:
        """The (c, h, w) sigmoid scores of single adapters, combined uniformly and by ``weights``.

        Each adapter has its own forward pass. Both sums are accumulated in the same passes, so
        memory does not depend on the number of adapters.
        """
        uniform = [LateFusion() for _ in self.images]
        weighted = [LateFusion() for _ in self.images]
        count = len(self.others.entries)
        for column in range(count):
            for index, scores in enumerate(self.predict(self.others.single(column))):
                uniform[index].add(scores, 1.0 / count)
                weighted[index].add(scores, float(self.weights[index, column]))
        return [late.total for late in uniform], [late.total for late in weighted]


@dataclass(frozen=True, slots=True)
class Paper:
    """A publication: short name and URL."""

    name: str
    url: str


_CAT_SEG = Paper("CAT-Seg", "https://arxiv.org/abs/2303.11797")
_SEMLA = Paper("SemLA", "https://arxiv.org/abs/2503.21780")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationMethod:
    """A way to use a library for a domain whose own adapter is left out.

    Attributes:
        label: Name in tables and reports.
        summary: What the method does.
        paper: Where the method was published.
        published_hmean: h-mean of mIoU over SemLA's 20 domains with CAT-Seg L, in [0, 1], from
            SemLA's tables of leave-one-out results and of fusion strategies.
        mode: The mode of :class:`~loraseg.inference.selection.AdaptiveSettings` that uses this
            method; None for methods that only an evaluation runs.
        predict: Returns the (c, h, w) scores of every image of a batch.
        is_late: Whether scores are combined instead of weights, at one forward pass per adapter.
        needs_own_adapter: Whether the method uses the domain's own adapter.
    """

    label: str
    summary: str
    paper: Paper
    published_hmean: float
    mode: AdapterMode | None = None
    predict: Callable[[ImageBatch], list[Tensor]]
    is_late: bool = False
    needs_own_adapter: bool = False


def _predict_zero_shot(batch: ImageBatch) -> list[Tensor]:
    return batch.predict(None)


def _predict_uniform(batch: ImageBatch) -> list[Tensor]:
    count = len(batch.others.entries)
    return batch.predict(batch.others.mix(np.full(count, 1.0 / count)))


def _predict_semla(batch: ImageBatch) -> list[Tensor]:
    mixes = [batch.others.mix(row) for row in batch.weights]
    return batch.per_image_predictor.predict(batch.images, batch.classes, mixes)


def _predict_late_uniform(batch: ImageBatch) -> list[Tensor]:
    return batch.late_fusion[0]


def _predict_late_semla(batch: ImageBatch) -> list[Tensor]:
    return batch.late_fusion[1]


def _predict_oracle(batch: ImageBatch) -> list[Tensor]:
    return batch.predict(batch.own.single(0))


METHODS: Mapping[Method, EvaluationMethod] = {
    "zero_shot": EvaluationMethod(
        label="zero-shot",
        summary="the base without adapters",
        paper=_CAT_SEG,
        published_hmean=0.394,
        mode="base",
        predict=_predict_zero_shot,
    ),
    "uniform": EvaluationMethod(
        label="uniform",
        summary="all other adapters, equal weights, one pass",
        paper=_SEMLA,
        published_hmean=0.519,
        mode="uniform",
        predict=_predict_uniform,
    ),
    "semla": EvaluationMethod(
        label="SemLA",
        summary="the nearest adapters of each image, weighted by distance, one pass",
        paper=_SEMLA,
        published_hmean=0.542,
        mode="fused",
        predict=_predict_semla,
    ),
    "late_uniform": EvaluationMethod(
        label="late uniform",
        summary="scores of every other adapter, averaged; one pass per adapter",
        paper=_SEMLA,
        published_hmean=0.493,
        predict=_predict_late_uniform,
        is_late=True,
    ),
    "late_semla": EvaluationMethod(
        label="late SemLA",
        summary="scores of every other adapter, SemLA's weights; one pass per adapter",
        paper=_SEMLA,
        published_hmean=0.521,
        predict=_predict_late_semla,
        is_late=True,
    ),
    "oracle": EvaluationMethod(
        label="oracle",
        summary="the domain's own adapter",
        paper=_SEMLA,
        published_hmean=0.611,
        predict=_predict_oracle,
        needs_own_adapter=True,
    ),
}
