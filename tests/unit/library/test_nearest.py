import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.library import nearest as module
from loraseg.library.nearest import CentroidIndex


def brute_force(query, rows, k, excluded=()):
    """Every distance in float64, sorted by distance, then row."""
    with np.errstate(over="ignore"):
        exact = np.linalg.norm(rows.astype(np.float64) - query.astype(np.float64), axis=1)
    order = [row for row in np.argsort(exact, kind="stable") if row not in set(excluded)][:k]
    return order, exact[order]


def check(queries, rows, k, excluded=()):
    """Compare a search of all queries, and of each alone, with brute force."""
    index = CentroidIndex(rows)
    left_out = np.array(sorted(excluded), dtype=np.int64)
    found, distances = index.search(queries, k, excluded=left_out)
    for query, ids, values in zip(queries, found, distances, strict=True):
        expected_ids, expected = brute_force(query, rows, k, excluded)
        assert ids.tolist() == expected_ids
        np.testing.assert_array_equal(values, expected)
        alone, alone_values = index.search(query, k, excluded=left_out)
        assert alone.tolist() == expected_ids
        np.testing.assert_array_equal(alone_values, expected)


@pytest.fixture
def narrow(monkeypatch):
    """Make the float32 pass run on small matrices too, over many blocks."""
    _narrow(monkeypatch)


def _narrow(patch):
    patch.setattr(module, "_BRUTE_FORCE_ROWS", 0)
    patch.setattr(module, "_BLOCK_ROWS_ONE_QUERY", 11)
    patch.setattr(module, "_BLOCK_ROWS_FEW_QUERIES", 7)
    patch.setattr(module, "_BLOCK_ROWS_MANY_QUERIES", 8)
    patch.setattr(module, "_MANY_QUERIES", 3)
    patch.setattr(module, "_QUERY_BATCH", 4)
    patch.setattr(module, "_EXACT_BLOCK_VALUES", 20)
    patch.setattr(module, "_MAX_PENDING_PAIRS", 16)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_equals_brute_force(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    count, size = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 12))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    scale = 10.0 ** data.draw(st.sampled_from([-44, -30, -19, -3, 0, 0, 0, 3, 17, 18, 19, 37]))
    offset = scale * data.draw(st.sampled_from([0, 0, 5, 1e4]))
    rows = rng.normal(size=(count, size)) * scale
    if data.draw(st.booleans()):  # Integers: ties between different rows, exact in all formats.
        rows = np.round(rows / scale * 2) * scale
    if data.draw(st.booleans()):  # Rows of very different norms.
        rows *= 10.0 ** rng.integers(-6, 2, size=(count, 1))
    rows[rng.integers(count, size=count // 2)] = rows[rng.integers(count)]
    if data.draw(st.booleans()):  # The nearest last, so that every row beats those before it.
        rows = rows[np.argsort(-np.linalg.norm(rows / scale, axis=1))]
    rows = np.clip(rows + offset, -3e38, 3e38).astype(dtype)
    some = rows[rng.integers(count, size=data.draw(st.integers(1, 7)))]
    queries = some + (rng.normal(size=some.shape) * scale).clip(-1e37, 1e37).astype(dtype)
    queries[0] = rows[0]
    excluded = rng.integers(count, size=data.draw(st.integers(0, count))).tolist()
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            _narrow(patch)
        check(queries, rows, data.draw(st.integers(1, 100)), excluded)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0, 1000, 1e6])
def test_near_ties_far_from_the_origin_are_resolved(dtype, offset):
    rng = np.random.default_rng(0)
    rows = (offset + 1e-3 * rng.normal(size=(2000, 256))).astype(dtype)
    check((offset + 1e-3 * rng.normal(size=(3, 256))).astype(dtype), rows, 7)


@pytest.mark.parametrize("queries", [1, 4])
def test_near_ties_that_float32_scores_put_in_the_wrong_order(queries):
    # Rows on a sphere around the query: |c|^2 - 2 c q differs in the last bits only.
    rng = np.random.default_rng(1)
    directions = rng.normal(size=(3000, 96))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    query = 10 * rng.normal(size=96)
    rows = query + directions * (1 + 1e-9 * rng.normal(size=(3000, 1)))
    low_rows, low_query = rows.astype(np.float32), query.astype(np.float32)
    scores = np.einsum("nd,nd->n", low_rows, low_rows) - 2 * (low_rows @ low_query)
    expected, _ = brute_force(query, rows, 5)
    assert np.argsort(scores, kind="stable")[:5].tolist() != expected
    check(np.tile(query, (queries, 1)), rows, 5)


def test_one_row_of_huge_norm_does_not_hide_the_others(narrow):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(200, 16)).astype(np.float32)
    rows[77] = 1e15
    check(rng.normal(size=(5, 16)).astype(np.float32), rows, 4)


def test_values_beyond_float32_are_compared_in_float64():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(100, 8))
    check(1e60 * rng.normal(size=(3, 8)), 1e60 * rows, 4)
    check(1e60 * rng.normal(size=(3, 8)), rows, 4, excluded=[0, 1])
    # Squares that even float64 does not hold: all are equally far.
    check(1e200 * rng.normal(size=(2, 8)), 1e200 * rows, 4)
    check(rng.normal(size=(2, 8)), np.full((60, 8), 1.5e308), 4, excluded=[0])


def test_rows_that_are_all_the_same_come_in_order(narrow):
    ids, distances = CentroidIndex(np.ones((100, 4))).search(np.zeros((5, 4)), 3)
    assert ids.tolist() == [[0, 1, 2]] * 5
    assert (distances == 2).all()


def test_only_few_rows_are_compared_in_float64(monkeypatch):
    compared = []
    norms = module._norms
    monkeypatch.setattr(module, "_norms", lambda x: compared.append(len(x)) or norms(x))
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(4096, 128)).astype(np.float32) + 3
    queries = rng.normal(size=(8, 128)).astype(np.float32) + 3
    CentroidIndex(rows).search(queries, 5)
    # About k after the first block and k more for each time that the rows double.
    assert 8 * 5 <= sum(compared) < 8 * 5 * 8


def test_reduced_precision_of_torch_changes_nothing():
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(4000, 256)).astype(np.float32)
    queries = rng.normal(size=(8, 256)).astype(np.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not module._torch_is_precise()
        check(queries, rows, 5)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not module._torch_is_precise()
        check(queries, rows, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert module._torch_is_precise()


def test_answers_are_the_same_whichever_library_multiplies(narrow, monkeypatch):
    monkeypatch.setattr(module, "_torch_is_precise", lambda: False)
    rng = np.random.default_rng(6)
    check(rng.normal(size=(6, 9)), rng.normal(size=(150, 9)), 5, excluded=[3, 3, 140])


def test_distances_are_those_of_the_search():
    rng = np.random.default_rng(7)
    rows, query = rng.normal(size=(700, 200)).astype(np.float32), rng.normal(size=200)
    index = CentroidIndex(rows)
    ids, distances = index.search(query, 700)
    np.testing.assert_array_equal(index.distances(query)[ids], distances)
    expected = [math.dist(row.astype(np.float64), query) for row in rows]
    np.testing.assert_allclose(index.distances(query), expected, rtol=1e-14)


def test_shapes_and_types():
    index = CentroidIndex(np.zeros((5, 3), dtype=np.float32))
    assert index.shape == (5, 3)
    for queries, k, shape in [((3,), 2, (2,)), ((4, 3), 9, (4, 5)), ((0, 3), 2, (0, 2))]:
        ids, distances = index.search(np.zeros(queries, dtype=np.float32), k)
        assert (ids.shape, distances.shape) == (shape, shape)
        assert (ids.dtype, distances.dtype) == (np.int64, np.float64)
    ids, distances = index.search(np.zeros((2, 3)), 1, excluded=np.arange(5))
    assert (ids.shape, distances.shape) == ((2, 0), (2, 0))


def test_rows_may_be_read_only_and_not_contiguous():
    rows = np.random.default_rng(8).normal(size=(6, 400)).T
    rows.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(rows[:2] + 0.1, rows, 3)


@pytest.mark.parametrize(
    ("query", "k", "error", "message"),
    [
        (np.zeros(2), 0, ConfigError, "k: got 0"),
        (np.zeros(3), 1, AdapterMismatchError, r"embedding of shape \(3,\)"),
        (np.zeros((1, 1, 2)), 1, AdapterMismatchError, "embedding of shape"),
        (np.array(0.0), 1, AdapterMismatchError, "embedding of shape"),
        (np.array([0, math.nan]), 1, StageError, "embedding: a component is not finite"),
        (np.array([[0, 0], [0, -math.inf]]), 1, StageError, "not finite"),
    ],
)
def test_search_refuses(query, k, error, message):
    with pytest.raises(error, match=message):
        CentroidIndex(np.zeros((3, 2))).search(query, k)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (np.zeros((0, 2)), AdapterMismatchError, r"centroids of shape \(0, 2\)"),
        (np.zeros((2, 0)), AdapterMismatchError, r"centroids of shape \(2, 0\)"),
        (np.zeros((2, 2), dtype=np.float16), AdapterMismatchError, "float16"),
        (np.array([[0, math.inf]]), StageError, "centroids: a component is not finite"),
    ],
)
def test_rows_are_checked(rows, error, message):
    with pytest.raises(error, match=message):
        CentroidIndex(rows)
