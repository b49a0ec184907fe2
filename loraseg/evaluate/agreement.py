"""Agreement of generated images with their masks, measured by an independent segmenter.

The segmenter (the judge) must not have been trained on images of the generator.
"""

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
    """Agreement of a judge's label maps with masks.

    Attributes:
        right: mIoU of the judge's label maps and the masks, in [0, 1].
        wrong: mIoU with the mask of the previous image, the level of chance.
        classes: IoU by class name; nan for a class that occurs in no mask and no label map.
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
        predict: The judge: returns label maps with the class ids of the masks.
        images: RGB, one per mask.
        masks: Class ids, 255 = ignore; at least two.
        names: Class names by id.

    Raises:
        DatasetError: There are fewer than two images, or shapes differ.
    """
    if len(images) < 2 or images.shape[:3] != masks.shape:
        raise DatasetError(
            f"images {images.shape}, masks {masks.shape}: expected at least two of equal size"
        )
    predicted = predict(images)
    right, wrong = ConfusionMatrix(len(names)), ConfusionMatrix(len(names))
    right.add(masks, predicted)
    wrong.add(np.roll(masks, 1, axis=0), predicted)
    iou = right.iou()
    classes = {name: float(value) for name, value in zip(names, iou, strict=True)}
    return MaskAgreement(float(right.miou()), float(wrong.miou()), classes)
