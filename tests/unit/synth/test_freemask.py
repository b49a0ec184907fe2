"""FreeMask's mean loss per class against a loop."""

import numpy as np
import pytest

from loraseg.errors import DatasetError
from loraseg.synth.freemask import class_mean_loss


def images(dtype, count=5, classes=4):
    random = np.random.default_rng(0)
    for number in range(count):
        mask = random.integers(0, classes, size=(3 + number, 5)).astype(dtype)
        mask[random.random(mask.shape) < 0.3] = np.iinfo(dtype).max
        loss = random.random(mask.shape, dtype=np.float32)
        loss[mask == np.iinfo(dtype).max] = np.nan  # must not be read
        yield mask, loss


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_class_mean_loss_against_a_loop(dtype):
    got = class_mean_loss(images(dtype), 6)
    values = {index: [] for index in range(6)}
    for mask, loss in images(dtype):
        for pixel in np.ndindex(mask.shape):
            if mask[pixel] < 6:
                values[mask[pixel]].append(float(loss[pixel]))
    for index in range(4):
        assert got[index] == pytest.approx(np.mean(values[index]), rel=1e-12)
    assert np.isnan(got[4:]).all()
    assert np.isnan(class_mean_loss([], 2)).all()


def test_class_mean_loss_refuses_mismatched_inputs():
    mask = np.full((2, 2), 3, dtype=np.uint8)
    with pytest.raises(DatasetError, match=r"real image 1: got class id 3, expected 0 to 2"):
        class_mean_loss([(mask - 1, np.ones((2, 2))), (mask, np.ones((2, 2)))], 3)
    with pytest.raises(DatasetError, match=r"real image 0: got a mask of \(2, 2\) and a loss of"):
        class_mean_loss([(mask, np.ones((2, 3)))], 4)
