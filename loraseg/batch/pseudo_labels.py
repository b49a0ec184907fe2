"""Predictions of a closed-set segmenter on generated images, as the filters take them."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from loraseg.data.labels import IGNORE
from loraseg.segment.closed_set.checkpoint import ClosedSetSegmenter
from loraseg.synth.vote import PseudoLabels
from loraseg.tensor_types import Float, Tensor, UInt8, ndarray

__all__ = ["FILTER_INPUTS", "predict_pseudo_labels"]

PredictionOutput = Literal["confidence", "loss"]

# What each filter needs besides the predicted labels.
FILTER_INPUTS: Mapping[str, tuple[PredictionOutput, ...]] = {
    "none": (),
    "relative": (),
    "confidence": ("confidence",),
    "freemask": ("loss",),
}


def predict_pseudo_labels(
    segmenter: ClosedSetSegmenter,
    images: UInt8[ndarray, "k h w 3"],
    mask: UInt8[ndarray, "h w"],
    *,
    outputs: Sequence[PredictionOutput] = (),
) -> PseudoLabels:
    """Segment the images of a mask one by one: memory holds the class scores of one image.

    Args:
        segmenter: Knows the classes of the mask.
        images: RGB.
        mask: Class ids that the images should show, or 255.
        outputs: What to return besides the labels: the largest class probability of each pixel, or
            the cross-entropy of the class of the mask (0 where the mask is 255).
    """
    labels = np.empty(images.shape[:3], np.uint8)
    confidence = np.empty(images.shape[:3], np.float32) if "confidence" in outputs else None
    loss = np.empty(images.shape[:3], np.float32) if "loss" in outputs else None
    for index, image in enumerate(images):
        scores = segmenter.log_probabilities(image[None])[0].cpu()
        best = scores.max(0)
        labels[index] = best.indices.byte().numpy()
        if confidence is not None:
            confidence[index] = best.values.exp().numpy()
        if loss is not None:
            loss[index] = _cross_entropy(scores, mask)
    return PseudoLabels(labels=labels, confidence=confidence, loss=loss)


def _cross_entropy(
    scores: Float[Tensor, "c h w"], mask: UInt8[ndarray, "h w"]
) -> Float[ndarray, "h w"]:
    """Return the negative log-probability of the class of the mask; 0 where the mask is 255."""
    known = mask != IGNORE
    target = torch.from_numpy(np.where(known, mask, 0).astype(np.int64))
    loss = -scores.gather(0, target[None])[0].numpy()
    return np.where(known, loss, np.float32(0)).astype(np.float32)
