import itertools
import statistics

import numpy as np
import pytest

from loraseg.errors import DatasetError, StageError
from loraseg.segment.metrics import ConfusionMatrix, hmean


def brute_force(label, pred, classes, ignore=255):
    """Return IoU by sets of pixels: |L & P| / |L | P| over the counted pixels."""
    pixels = [pixel for pixel in np.ndindex(label.shape) if label[pixel] != ignore]
    ious = []
    for index in range(classes):
        labelled = {pixel for pixel in pixels if label[pixel] == index}
        predicted = {pixel for pixel in pixels if pred[pixel] == index}
        union = labelled | predicted
        ious.append(len(labelled & predicted) / len(union) if union else float("nan"))
    present = [index for index in range(classes) if any(label[p] == index for p in pixels)]
    accuracy = sum(label[pixel] == pred[pixel] for pixel in pixels) / len(pixels)
    return np.array(ious), statistics.fmean(ious[index] for index in present), accuracy


def maps(seed, shape=(13, 9), classes=5, ids=None):
    generator = np.random.default_rng(seed)
    label = generator.choice(ids or [0, 1, 2, 255], size=shape).astype(np.uint8)
    pred = generator.integers(0, classes, size=shape).astype(np.uint8)
    return label, pred


@pytest.mark.parametrize("seed", range(5))
def test_equals_sets_of_pixels(seed):
    label, pred = maps(seed, classes=4)  # class 3: predicted, never labelled; class 4: neither
    pred[0, :3] = 255
    matrix = ConfusionMatrix(5)
    matrix.add(label, pred)
    iou, miou, accuracy = brute_force(label, pred, 5)
    np.testing.assert_allclose(matrix.iou(), iou, rtol=0, atol=1e-15)
    assert matrix.iou()[3] == 0
    assert np.isnan(matrix.iou()[4])
    assert matrix.miou() == pytest.approx(miou, abs=1e-15)
    assert matrix.pixel_accuracy() == pytest.approx(accuracy, abs=1e-15)


def test_streaming_and_merging_equal_one_pass():
    batches = [maps(seed) for seed in range(4)]
    whole, left, right = (ConfusionMatrix(5) for _ in range(3))
    whole.add(*(np.stack(part) for part in zip(*batches, strict=True)))
    for index, batch in enumerate(batches):
        (left if index % 2 else right).add(*batch)
    np.testing.assert_array_equal(left.merge(right).counts, whole.counts)
    np.testing.assert_array_equal(right.merge(left).counts, whole.counts)


def test_renaming_classes_permutes_the_scores():
    label, pred = maps(3, ids=[0, 1, 2, 3, 4, 255])
    order = np.array([3, 0, 4, 1, 2] + [255] * 251, dtype=np.uint8)
    matrix, renamed = ConfusionMatrix(5), ConfusionMatrix(5)
    matrix.add(label, pred)
    renamed.add(order[label], order[pred])
    np.testing.assert_array_equal(renamed.iou()[order[:5]], matrix.iou())
    assert renamed.miou() == pytest.approx(matrix.miou(), abs=1e-15)


def test_every_integer_dtype_gives_the_same_counts():
    label, pred = maps(1)
    counts = []
    for kind in (np.uint8, np.int64):
        matrix = ConfusionMatrix(5)
        matrix.add(label.astype(kind), pred.astype(kind))
        counts.append(matrix.counts)
    np.testing.assert_array_equal(*counts)


def test_predictions_on_ignored_pixels_are_not_counted():
    label = np.array([0, 255], dtype=np.int64)
    matrix = ConfusionMatrix(2)
    matrix.add(label, np.array([0, 99]))
    assert matrix.miou() == 1.0


@pytest.mark.parametrize(
    ("label", "pred", "match"),
    [
        ([0, 2], [0, 0], r"label ids from 0 to 2; expected 0 to 1 or 255"),
        ([0, 1], [0, 7], r"prediction ids from 0 to 7; expected 0 to 1 or 255"),
        ([0, 1], [0, -1], r"prediction ids from -1 to 0"),
        ([0, 1], [0], r"differ in shape"),
        ([0, 1], [0.0, 1.0], r"must be integers"),
    ],
)
def test_refuses_unknown_ids_and_different_shapes(label, pred, match):
    with pytest.raises(DatasetError, match=match):
        ConfusionMatrix(2).add(np.array(label), np.array(pred))


def test_refuses_to_score_without_labels():
    matrix = ConfusionMatrix(3)
    matrix.add(np.full((2, 2), 255), np.zeros((2, 2), dtype=int))
    for score in (matrix.miou, matrix.pixel_accuracy):
        with pytest.raises(StageError, match="no labelled pixel"):
            score()
    assert np.isnan(matrix.iou()).all()


def test_refuses_other_matrices_and_settings():
    with pytest.raises(DatasetError, match=r"cannot merge matrices of 3 classes .* and 2 classes"):
        ConfusionMatrix(3).merge(ConfusionMatrix(2))
    for classes, ignore in ((0, 255), (4, 3)):
        with pytest.raises(DatasetError, match="expected at least one class"):
            ConfusionMatrix(classes, ignore_index=ignore)


def test_hmean_equals_the_standard_library():
    for values in ([0.394], [46.5, 47.1, 37.9, 47.1], [1e-300, 1.0], [3.0, 3.0, 3.0]):
        assert hmean(values) == pytest.approx(statistics.harmonic_mean(values), rel=1e-14)


def test_hmean_of_zero_and_extreme_values():
    assert hmean([0.5, 0.0, 0.9]) == 0
    assert hmean([5e-324, 1.0]) == pytest.approx(1e-323)
    for order in itertools.permutations([0.1, 0.7, 0.9]):
        assert hmean(order) == hmean([0.9, 0.7, 0.1])


@pytest.mark.parametrize(
    "values", [[], [0.5, float("nan")], [0.0, float("nan")], [-0.1], [float("inf")]]
)
def test_hmean_refuses_invalid_scores(values):
    with pytest.raises(StageError, match="needs finite scores"):
        hmean(values)
