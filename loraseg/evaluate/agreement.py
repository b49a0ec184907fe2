"""Do images show what their masks say? Judged by a segmenter that has not seen the generator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loraseg.errors import DatasetError
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["MaskAgreement", "measure_agreement"]

LabelPredictor = Callable[[UInt8[ndarray, "n h w 3"]], UInt8[ndarray, "n h w"]]


@dataclass(frozen=True, slots=True)
class MaskAgreement:
    """How far a judge finds the masks in the images.

    Attributes:
        right: mIoU of the judge's labels against the masks, in [0, 1].
        wrong: The same against the mask of the image before: what chance gives.
        classes: IoU by class name; nan for a class that is in no mask and was never seen.
    """

    right: float
    wrong: float
    classes: dict[str, float]


def measure_agreement(
    predict: LabelPredictor,
    images: UInt8[ndarray, "n h w 3"],
    masks: UInt8[ndarray, "n h w"],
    names: Sequence[str],
) -> MaskAgreement:
    """Measure the agreement of images with their masks.

    Args:
        predict: Labels images with the ids of the masks.
        images: RGB, one a mask.
        masks: Class ids, 255 = ignore; at least two, so that there is a wrong one.
        names: Class names by id.

    Raises:
        DatasetError: There are fewer than two images, or shapes differ.
    """
    if len(images) < 2 or images.shape[:3] != masks.shape:
        raise DatasetError(
            f"images {images.shape}, masks {masks.shape}: expected at least two of equal size"
        )
    found = predict(images)
    right, wrong = ConfusionMatrix(len(names)), ConfusionMatrix(len(names))
    right.add(masks, found)
    wrong.add(np.roll(masks, 1, axis=0), found)
    iou = right.iou()
    classes = {name: float(value) for name, value in zip(names, iou, strict=True)}
    return MaskAgreement(float(right.miou()), float(wrong.miou()), classes)
