"""Score of a base, with or without an adapter, on labelled images."""

from collections.abc import Sequence

from loraseg.data import Dataset, Sample, load_pair
from loraseg.fuse.mix import Mix
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.segment.open_vocabulary.pixel_maps import label_map
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.protocol import OpenVocabularyBase

__all__ = ["mean_iou"]

_BATCH_SIZE = 8


def mean_iou(
    base: OpenVocabularyBase, dataset: Dataset, samples: Sequence[Sample], mix: Mix | None
) -> float:
    """Return the mIoU in [0, 1] of plain prediction, from counts summed over all images.

    Raises:
        DatasetError: An image is broken, or has no mask.
        StageError: No pixel is labelled.
    """
    classes = dataset.label_space.names
    predictor = Predictor(base)
    counts = ConfusionMatrix(len(classes))
    for start in range(0, len(samples), _BATCH_SIZE):
        loaded = [load_pair(dataset, sample) for sample in samples[start : start + _BATCH_SIZE]]
        maps = predictor.predict([image for image, _ in loaded], classes, mix)
        for (_, mask), scores in zip(loaded, maps, strict=True):
            counts.add(mask, label_map(scores))
    return counts.miou()
