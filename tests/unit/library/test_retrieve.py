import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.library import Retriever, top_k
from loraseg.library import retrieve as module
from loraseg.library.snapshot import Entry
from tests.unit.library.making import make_card, make_centroid


def brute_force(query, centroids, k):
    """Every distance in float64, one row at a time."""
    pairs = []
    for index, row in enumerate(np.asarray(centroids, dtype=np.float64)):
        total = math.fsum((float(a) - float(b)) ** 2 for a, b in zip(row, query, strict=True))
        pairs.append((math.sqrt(total), index))
    chosen = sorted(pairs)[:k]
    return [index for _, index in chosen], [distance for distance, _ in chosen]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 60),
    d=st.integers(1, 12),
    k=st.integers(1, 70),
    single=st.booleans(),
    narrow=st.booleans(),
)
def test_equals_brute_force(seed, n, d, k, single, narrow):
    rng = np.random.default_rng(seed)
    dtype = np.float32 if single else np.float64
    centroids = (rng.normal(size=(n, d)) * 3 + 5).astype(dtype)
    # Exact doubles, so that ties happen.
    centroids[rng.integers(n, size=n // 3)] = centroids[0]
    query = rng.normal(size=d).astype(dtype) + 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_EXACT_SIZE", 0 if narrow else 2**18)
        indices, distances = top_k(query, centroids, k)
    expected_indices, expected_distances = brute_force(query, centroids, k)
    assert indices.tolist() == expected_indices
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_near_ties_far_from_the_origin_are_told_apart(dtype):
    # |c|^2 - 2 c q cancels almost all digits here: the candidates' margin must cover that.
    rng = np.random.default_rng(0)
    centroids = (1000 + 1e-3 * rng.normal(size=(2000, 256))).astype(dtype)
    query = (1000 + 1e-3 * rng.normal(size=256)).astype(dtype)
    exact = np.linalg.norm(centroids.astype(np.float64) - query.astype(np.float64), axis=1)
    indices, distances = top_k(query, centroids, 7)
    assert indices.tolist() == np.argsort(exact, kind="stable")[:7].tolist()
    np.testing.assert_array_equal(distances, exact[indices])


def test_the_narrow_path_looks_at_few_rows():
    rng = np.random.default_rng(1)
    centroids = rng.normal(size=(3000, 128)).astype(np.float32)
    found = module._candidates(rng.normal(size=128), centroids, 5)
    assert 5 <= len(found) < 100


@pytest.mark.parametrize(
    ("query", "centroids", "k", "error", "message"),
    [
        (np.zeros(2), np.zeros((3, 2)), 0, ConfigError, "k: got 0"),
        (np.zeros(2), np.zeros((3, 4)), 1, AdapterMismatchError, "embedding of shape"),
        (np.array([0, math.nan]), np.zeros((3, 2)), 1, StageError, "not finite"),
    ],
)
def test_top_k_refuses(query, centroids, k, error, message):
    with pytest.raises(error, match=message):
        top_k(query, centroids, k)


def _card(number, vector, kinds):
    return make_card(f"n{number}", centroids=[make_centroid(vector, **kinds)])


def entries(*vectors, **kinds):
    return tuple(
        Entry(1, f"{i:064x}", _card(i, v, kinds), True, "e" * 64, 1) for i, v in enumerate(vectors)
    )


FOUR = entries((3.0, 4.0), (0.0, 1.0), (0.0, -1.0), (0.0, 2.0))


def names(found):
    return [item.entry.name for item in found]


def test_retrieves_nearest_first_with_weights():
    found = Retriever(FOUR).retrieve(np.zeros(2), 3, 0.5)
    assert names(found) == ["n1", "n2", "n3"]
    assert [item.distance for item in found] == [1.0, 1.0, 2.0]
    scores = [math.exp(1 / (d * 0.5)) for d in (1.0, 1.0, 2.0)]
    expected = [score / sum(scores) for score in scores]
    assert [item.weight for item in found] == pytest.approx(expected, abs=1e-12)


def test_an_exact_hit_takes_all():
    found = Retriever(FOUR).retrieve(np.array([3.0, 4.0]), 2, 0.05)
    assert [(item.entry.name, item.weight) for item in found] == [("n0", 1.0), ("n3", 0.0)]


def test_exclude_comes_before_ranking():
    retriever = Retriever(FOUR)
    assert names(retriever.retrieve(np.zeros(2), 2, 1.0, {"n1", "unknown"})) == ["n2", "n3"]
    assert names(retriever.retrieve(np.zeros(2), 9, 1.0, ["n0"])) == ["n1", "n2", "n3"]
    assert retriever.retrieve(np.zeros(2), 2, 1.0, [e.name for e in FOUR]) == []
    assert Retriever(()).retrieve(np.zeros(2), 2, 1.0) == []
    assert Retriever(()).retrieve(np.zeros(2), 2, 1.0, ["x"]) == []


def test_several_centroids_count_by_the_nearest():
    card = make_card("two", centroids=[make_centroid((9.0, 0.0)), make_centroid((0.0, 0.5))])
    two = Entry(1, "f" * 64, card, True, "e" * 64, 1)
    found = Retriever([*FOUR, two]).retrieve(np.zeros(2), 2, 1.0)
    assert [(item.entry.name, item.distance) for item in found] == [("two", 0.5), ("n1", 1.0)]
    assert len(Retriever([two]).retrieve(np.zeros(2), 2, 1.0)) == 1


@pytest.mark.parametrize(
    "others",
    [
        entries((1.0, 2.0), encoder_id="other"),
        entries((1.0, 2.0), normalised=True),
        entries((1.0, 2.0, 3.0)),
    ],
)
def test_mixed_encoders_are_refused(others):
    with pytest.raises(AdapterMismatchError, match=r"centroids of different kinds.*'n0'"):
        Retriever([*FOUR, *others])


def test_an_encoder_can_be_chosen():
    both = make_card(
        "both", centroids=[make_centroid((9.0,), encoder_id="a"), make_centroid(encoder_id="b")]
    )
    entry = Entry(1, "f" * 64, both, True, "e" * 64, 1)
    assert len(Retriever([entry], encoder_id="a").retrieve(np.zeros(1), 1, 1.0)) == 1
    with pytest.raises(AdapterMismatchError, match="'both' has no centroid of encoder 'c'"):
        Retriever([entry], encoder_id="c")
    with pytest.raises(AdapterMismatchError, match="'bare' has no centroid"):
        Retriever([Entry(1, "f" * 64, make_card("bare", centroids=()), True, "e" * 64, 1)])
