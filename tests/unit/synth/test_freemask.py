"""FreeMask's statistics against loops and against the formula of the authors' code."""

import numpy as np
import pytest

from loraseg.errors import ConfigError, DatasetError
from loraseg.synth.freemask import class_mean_loss, freemask_counts, mask_hardness


def images(dtype, count=5, classes=4):
    random = np.random.default_rng(0)
    for number in range(count):
        mask = random.integers(0, classes, size=(3 + number, 5)).astype(dtype)
        mask[random.random(mask.shape) < 0.3] = np.iinfo(dtype).max
        loss = random.random(mask.shape, dtype=np.float32)
        loss[mask == np.iinfo(dtype).max] = np.nan  # whatever stands there
        yield mask, loss


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_class_mean_loss_against_a_loop(dtype):
    got = class_mean_loss(images(dtype), 6)
    values = {index: [] for index in range(6)}
    for mask, loss in images(dtype):
        for place in np.ndindex(mask.shape):
            if mask[place] < 6:
                values[mask[place]].append(float(loss[place]))
    for index in range(4):
        assert got[index] == pytest.approx(np.mean(values[index]), rel=1e-12)
    assert np.isnan(got[4:]).all()
    assert np.isnan(class_mean_loss([], 2)).all()


def test_class_mean_loss_refuses_what_does_not_fit():
    mask = np.full((2, 2), 3, dtype=np.uint8)
    with pytest.raises(DatasetError, match=r"real image 1: got class id 3, expected 0 to 2"):
        class_mean_loss([(mask - 1, np.ones((2, 2))), (mask, np.ones((2, 2)))], 3)
    with pytest.raises(DatasetError, match=r"real image 0: got a mask of \(2, 2\) and a loss of"):
        class_mean_loss([(mask, np.ones((2, 3)))], 4)


def test_hardness_is_the_mean_over_labelled_pixels():
    losses = np.array([1.0, 4.0, np.nan])
    mask = np.array([[0, 0, 1, 255]], dtype=np.uint8)
    assert mask_hardness(mask, losses) == pytest.approx((1 + 1 + 4) / 3)
    assert mask_hardness(np.array([[1, 2]], dtype=np.uint16), losses) == pytest.approx(2)
    assert mask_hardness(np.full((2, 2), 255, dtype=np.uint8), losses) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 41])
@pytest.mark.parametrize("limit", [1, 5, 20])
def test_counts_against_the_authors_formula(count, limit):
    hardness = np.random.default_rng(count).integers(0, 5, size=count).astype(float)
    got = freemask_counts(hardness, limit=limit)
    order = sorted(range(count), key=lambda index: hardness[index])
    for rank, index in enumerate(order):
        assert got[index] == min(1 + round((rank + 1) / count * limit), limit)
    assert (np.diff(got[order]) >= 0).all()


def test_counts_of_nothing():
    assert freemask_counts(np.zeros(0)).shape == (0,)
    with pytest.raises(ConfigError, match="limit: got 0, expected at least 1"):
        freemask_counts(np.ones(2), limit=0)
