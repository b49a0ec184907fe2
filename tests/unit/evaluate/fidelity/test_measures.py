"""Fidelity measures against dense float64 formulas, scipy and hand-computed cases."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist

from loraseg.errors import DatasetError, StageError
from loraseg.evaluate.fidelity import measures


def points(count, seed=0, *, dimensions=6, shift=0.0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(shift, 1.0, (count, dimensions)) * np.linspace(0.5, 1.5, dimensions)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def small_blocks(monkeypatch):
    # Sets of a few rows then have full blocks, a partial block and off-diagonal blocks.
    monkeypatch.setattr(measures, "_BLOCK", 4)


def test_unit_rows():
    rows = np.array([[3.0, 4.0], [0.0, -2.0]], np.float32)
    normalised = measures.l2_normalise(rows)
    assert normalised.dtype == np.float64
    np.testing.assert_allclose(normalised, [[0.6, 0.8], [0.0, -1.0]], rtol=0, atol=1e-15)
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(StageError, match="embedding 1: length"):
            measures.l2_normalise(np.array([[1.0, 0.0], [bad, 0.0]]))


def test_cmmd_by_hand():
    # Two points at squared distance 2, and one of them alone. With k = exp(-2 / (2 sigma^2)) the
    # means are (2 + 2k) / 4 and 1 within the sets and (1 + k) / 2 across: (1 - k) / 2 in all.
    first, second = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])
    expected = 1000 * (1 - math.exp(-2 / 200)) / 2
    assert measures.cmmd(first, second) == pytest.approx(expected, rel=1e-12)
    assert measures.cmmd(second, first) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 8), (9, 6), (13, 30)])
@pytest.mark.parametrize("sigma", [10.0, 0.5])
@pytest.mark.usefixtures("small_blocks")
def test_cmmd_is_the_dense_formula(n, m, sigma):
    first, second = points(n, 1), points(m, 2, shift=0.7)

    def kernel(x, y):
        return np.exp(-cdist(x, y, "sqeuclidean") / (2 * sigma**2)).mean()

    expected = kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)
    got = measures.cmmd(first, second, sigma=sigma)
    assert got == pytest.approx(1000 * expected, rel=1e-9, abs=1e-10)
    assert got > 0


@pytest.mark.usefixtures("small_blocks")
def test_cmmd_of_a_set_with_itself_is_zero():
    rows = points(11)
    assert 0 <= measures.cmmd(rows, rows) < 1e-10
    # Order and repetition do not change the distribution.
    assert 0 <= measures.cmmd(rows, np.concatenate([rows[::-1], rows])) < 1e-10


def test_frechet_distance_is_the_formula_with_scipys_root():
    first, second = points(40, 3), points(25, 4, shift=0.5)
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    means = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    expected = means + np.trace(c1 + c2 - 2 * np.real(scipy.linalg.sqrtm(c1 @ c2)))
    got = measures.frechet_distance(first, second)
    assert got == pytest.approx(expected, rel=0, abs=1e-12)
    assert measures.frechet_distance(second, first) == pytest.approx(got, rel=0, abs=1e-12)


@pytest.mark.usefixtures("small_blocks")
def test_frechet_distance_with_fewer_images_than_dimensions():
    # Two points: C1 = v v^T with v = (x - y) / sqrt(2), and tr (C1 C2)^(1/2) = (v^T C2 v)^(1/2).
    first, second = points(2, 3), points(5, 4)
    c2 = np.cov(second, rowvar=False)
    v = (first[0] - first[1]) / math.sqrt(2)
    means = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    expected = means + v @ v + np.trace(c2) - 2 * math.sqrt(v @ c2 @ v)
    assert measures.frechet_distance(first, second) == pytest.approx(expected, rel=0, abs=1e-8)
    assert 0 <= measures.frechet_distance(first, first) < 1e-12


def test_frechet_distance_of_scaled_and_shifted_rows():
    # Scaling by s and shifting by t along one axis give (s - 1)^2 tr C + t^2.
    rows = np.random.default_rng(5).normal(size=(50, 3))
    moved = 3 * rows
    moved[:, 0] += rows[:, 0].mean() * -2 + 0.25
    moved[:, 1:] -= 2 * rows[:, 1:].mean(axis=0)
    expected = 4 * np.trace(np.cov(rows, rowvar=False)) + 0.25**2
    assert measures.frechet_distance(rows, moved) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [6, 40])
def test_knn_distances_exclude_the_row_itself(count):
    rows = points(count, 6)
    dense = cdist(rows, rows)
    np.fill_diagonal(dense, np.inf)
    expected = np.sort(dense, axis=1)[:, :5]
    np.testing.assert_allclose(measures.knn_distances(rows, 5), expected, rtol=0, atol=1e-12)


def test_knn_distances_of_equal_rows():
    # With nine equal rows, a row may be absent from its own two nearest.
    rows = np.concatenate([np.tile(points(1, 7), (9, 1)), points(2, 8)])
    got = measures.knn_distances(rows, 1)
    assert (got[:9] == 0).all()
    assert got[9:, 0] == pytest.approx(np.sort(cdist(rows, rows)[9:], axis=1)[:, 1], abs=1e-12)


def test_knn_distances_need_more_than_k_rows():
    with pytest.raises(DatasetError, match="5 nearest others: got 5 rows, expected over 5"):
        measures.knn_distances(points(5), 5)


def test_nearest_rows():
    queries, rows = points(9, 9), points(30, 10)
    indices, distances = measures.nearest_neighbours(queries, rows)
    dense = cdist(queries, rows)
    assert indices.tolist() == dense.argmin(axis=1).tolist()
    np.testing.assert_allclose(distances, dense.min(axis=1), rtol=0, atol=1e-12)


def brute_force_coverage(first, second, k):
    covered = 0
    for i, point in enumerate(first):
        others = sorted(math.dist(point, other) for j, other in enumerate(first) if j != i)
        covered += any(math.dist(point, other) <= others[k - 1] for other in second)
    return covered / len(first)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_coverage_equals_a_loop_over_points(k):
    first, second = points(25, 11), points(12, 12, shift=0.4)
    for a, b in ((first, second), (second, first)):
        radii = measures.knn_distances(a, k)[:, k - 1]
        got = measures.coverage(radii, measures.nearest_neighbours(a, b)[1])
        assert got == brute_force_coverage(a, b, k)


def test_coverage_of_constructed_sets():
    # Two distant clusters of ten points; ``near_first`` has points in the first cluster only.
    rng = np.random.default_rng(13)
    first, second = (rng.normal(centre, 0.01, (10, 3)) for centre in (0.0, 5.0))
    both, near_first = np.concatenate([first, second]), first[:7] + 1e-4

    def coverage(a, b):
        return measures.coverage(
            measures.knn_distances(a, 5)[:, 4], measures.nearest_neighbours(a, b)[1]
        )

    assert coverage(both, near_first) == 0.5
    assert coverage(near_first, both) == 1.0
    assert coverage(both, both) == 1.0
    assert coverage(second, first) == 0.0


def test_near_duplicate_threshold_is_the_first_percentile():
    nearest = np.arange(1, 202, dtype=np.float64)[::-1].copy()
    assert measures.near_duplicate_threshold(nearest) == 3.0
    assert measures.near_duplicate_threshold(np.array([0.5, 0.5])) == 0.5


def test_mean_pairwise_distance_is_the_mean_over_pairs():
    rows = points(7, 14)
    pairs = [1 - float(a @ b) for a, b in itertools.combinations(rows, 2)]
    assert measures.mean_pairwise_distance(rows) == pytest.approx(np.mean(pairs), abs=1e-14)
    assert measures.mean_pairwise_distance(np.eye(3)) == 1.0
    with pytest.raises(DatasetError, match="got 1 rows, expected at least 2"):
        measures.mean_pairwise_distance(rows[:1])


def test_within_mask_distance_weights_masks_equally():
    # Mask a: three orthogonal images, distance 1. Mask b: two images at 60 degrees, distance 1/2.
    # Mask c: one image.
    angle = math.sqrt(3) / 2
    rows = np.array([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0.5, angle], [1, 0, 0]])
    got = measures.within_mask_distance(rows, ["a", "b", "a", "a", "b", "c"])
    assert got == (pytest.approx(0.75, abs=1e-14), 2, 5)
    assert measures.within_mask_distance(rows[:2], ["a", "b"]) == (None, 0, 0)


def test_sets_must_not_be_empty():
    with pytest.raises(DatasetError, match="got 0 and 4 embeddings, expected at least 1 of each"):
        measures.cmmd(points(0), points(4))
    with pytest.raises(DatasetError, match="got 4 and 1 embeddings, expected at least 2 of each"):
        measures.frechet_distance(points(4), points(1))
    with pytest.raises(DatasetError, match="got 4 and 0 embeddings"):
        measures.nearest_neighbours(points(4), points(0))
