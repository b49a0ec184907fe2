import math
from decimal import Decimal, getcontext

import numpy as np
import pytest

from loraseg.errors import ConfigError, StageError
from loraseg.fuse.weights import mixing_weights


def plain_formula(distances, temperature):
    """Return SemLA's weights as written, in 60-digit arithmetic."""
    getcontext().prec = 60
    terms = [(1 / (Decimal(d) * Decimal(temperature))).exp() for d in distances]
    return [float(term / sum(terms)) for term in terms]


@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
@pytest.mark.parametrize(
    "distances", [(0.5,), (0.8, 0.81, 2.0), (0.04, 0.041, 0.05), (1e3, 2e3), (10.0, 9.0, 7.5, 7.4)]
)
def test_agrees_with_the_plain_formula(distances, temperature):
    weights = mixing_weights(distances, temperature)
    np.testing.assert_allclose(weights, plain_formula(distances, temperature), rtol=0, atol=1e-12)


@pytest.mark.parametrize("nearest", [0.0, 1e-320, 1e-9, 0.01, 1e3])
def test_stays_finite_and_sums_to_one(nearest):
    weights = mixing_weights([nearest, nearest * 2 + 1, 5e3], 0.05)
    assert weights.dtype == np.float64
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-15)
    assert weights.argmax() == 0


def test_zero_distances_share_the_weight():
    assert mixing_weights([0.3, 0.0, 0.1, 0.0], 0.05).tolist() == [0.0, 0.5, 0.0, 0.5]


def test_order_does_not_matter():
    distances = np.array([3.0, 1.0, 2.0, 1.5])
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(
        mixing_weights(distances, 0.3)[order], mixing_weights(distances[order], 0.3), rtol=1e-15
    )


def test_integer_distances_and_no_distances():
    assert mixing_weights(np.array([2, 2]), 0.1).tolist() == [0.5, 0.5]
    assert mixing_weights([], 0.1).shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_refuses_invalid_temperatures(temperature):
    with pytest.raises(ConfigError, match="temperature: got"):
        mixing_weights([1.0], temperature)


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
def test_refuses_invalid_distances(bad):
    with pytest.raises(StageError, match="distance 1: got"):
        mixing_weights([1.0, bad], 0.1)
    with pytest.raises(StageError, match="one vector"):
        mixing_weights(np.ones((1, 2)), 0.1)
