import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.fuse import mixing_weights
from loraseg.library import AdapterRetriever
from loraseg.library.nearest import CentroidIndex
from loraseg.library.snapshot import CatalogEntry
from tests.unit.library.sample_adapters import make_card, make_centroid


def _card(number, vector, kinds):
    return make_card(f"n{number}", centroids=[make_centroid(vector, **kinds)])


def entries(*vectors, **kinds):
    return tuple(
        CatalogEntry(1, f"{i:064x}", _card(i, v, kinds), True, "e" * 64, 1)
        for i, v in enumerate(vectors)
    )


FOUR = entries((3.0, 4.0), (0.0, 1.0), (0.0, -1.0), (0.0, 2.0))


def names(retrieved):
    return [item.entry.name for item in retrieved]


def test_retrieves_nearest_first_with_weights():
    found = AdapterRetriever(FOUR).retrieve(np.zeros(2), 3, 0.5)
    assert names(found) == ["n1", "n2", "n3"]
    assert [item.distance for item in found] == [1.0, 1.0, 2.0]
    scores = [math.exp(1 / (d * 0.5)) for d in (1.0, 1.0, 2.0)]
    expected = [score / sum(scores) for score in scores]
    assert [item.weight for item in found] == pytest.approx(expected, abs=1e-12)


def test_an_exact_hit_takes_all():
    found = AdapterRetriever(FOUR).retrieve(np.array([3.0, 4.0]), 2, 0.05)
    assert [(item.entry.name, item.weight) for item in found] == [("n0", 1.0), ("n3", 0.0)]


def test_exclude_comes_before_ranking():
    retriever = AdapterRetriever(FOUR)
    assert names(retriever.retrieve(np.zeros(2), 2, 1.0, {"n1", "unknown"})) == ["n2", "n3"]
    assert names(retriever.retrieve(np.zeros(2), 9, 1.0, ["n0"])) == ["n1", "n2", "n3"]
    assert retriever.retrieve(np.zeros(2), 2, 1.0, [e.name for e in FOUR]) == []
    assert AdapterRetriever(()).retrieve(np.zeros(2), 2, 1.0) == []
    assert AdapterRetriever(()).retrieve(np.zeros(2), 2, 1.0, ["x"]) == []


def test_several_centroids_count_by_the_nearest():
    card = make_card("two", centroids=[make_centroid((9.0, 0.0)), make_centroid((0.0, 0.5))])
    two = CatalogEntry(1, "f" * 64, card, True, "e" * 64, 1)
    found = AdapterRetriever([*FOUR, two]).retrieve(np.zeros(2), 2, 1.0)
    assert [(item.entry.name, item.distance) for item in found] == [("two", 0.5), ("n1", 1.0)]
    assert len(AdapterRetriever([two]).retrieve(np.zeros(2), 2, 1.0)) == 1


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 14), most=st.integers(1, 6), ties=st.booleans())
def test_a_batch_equals_each_image_and_brute_force(seed, k, most, ties):
    rng = np.random.default_rng(seed)
    vectors = [rng.normal(size=(rng.integers(1, most + 1), 4)) for _ in range(12)]
    if ties:
        vectors = [np.round(own) for own in vectors]
    cards = [
        make_card(f"n{i}", centroids=[make_centroid(tuple(v)) for v in own])
        for i, own in enumerate(vectors)
    ]
    retriever = AdapterRetriever(
        [CatalogEntry(1, "f" * 64, card, True, "e" * 64, 1) for card in cards]
    )
    embeddings = np.round(rng.normal(size=(5, 4)) * 2)
    exclude = {f"n{i}" for i in rng.integers(12, size=rng.integers(0, 13))}
    batch = retriever.retrieve_batch(embeddings, k, 0.3, exclude)
    assert batch == [retriever.retrieve(e, k, 0.3, exclude) for e in embeddings]
    exact = [[min(np.linalg.norm(own - e, axis=1)) for own in vectors] for e in embeddings]
    np.testing.assert_array_equal(retriever.distances(embeddings), exact)
    for found, distances in zip(batch, exact, strict=True):
        order = [i for i in np.argsort(distances, kind="stable") if f"n{i}" not in exclude][:k]
        assert names(found) == [f"n{i}" for i in order]
        nearest = [distances[i] for i in order]
        assert [item.distance for item in found] == nearest
        assert [item.weight for item in found] == mixing_weights(nearest, 0.3).tolist()


def test_few_rows_are_asked_for_where_adapters_have_several_centroids(monkeypatch):
    cards = [make_card(f"n{i}", centroids=[make_centroid((float(i),))] * 3) for i in range(50)]
    retriever = AdapterRetriever(
        [CatalogEntry(1, "f" * 64, card, True, "e" * 64, 1) for card in cards]
    )
    asked = []
    search = CentroidIndex.search
    monkeypatch.setattr(
        CentroidIndex,
        "search",
        lambda self, queries, k, **rest: asked.append(k) or search(self, queries, k, **rest),
    )
    assert names(retriever.retrieve(np.zeros(1), 4, 1.0)) == ["n0", "n1", "n2", "n3"]
    assert asked == [3 * 3 + 1]


def test_an_empty_retriever_and_an_empty_batch():
    assert AdapterRetriever(()).retrieve_batch(np.zeros((3, 2)), 2, 1.0) == [[], [], []]
    assert AdapterRetriever(()).distances(np.zeros((3, 2))).shape == (3, 0)
    assert AdapterRetriever(FOUR).retrieve_batch(np.zeros((0, 2)), 2, 1.0) == []
    assert AdapterRetriever(FOUR).distances(np.zeros((0, 2))).shape == (0, 4)


@pytest.mark.parametrize(
    ("embedding", "k", "error", "message"),
    [
        (np.zeros(2), 0, ConfigError, "k: got 0"),
        (np.zeros(3), 1, AdapterMismatchError, "embedding of shape"),
        (np.array([0, math.nan]), 1, StageError, "not finite"),
    ],
)
def test_what_cannot_be_retrieved_is_refused(embedding, k, error, message):
    with pytest.raises(error, match=message):
        AdapterRetriever(FOUR).retrieve(embedding, k, 1.0)


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
        AdapterRetriever([*FOUR, *others])


def test_an_encoder_can_be_chosen():
    both = make_card(
        "both", centroids=[make_centroid((9.0,), encoder_id="a"), make_centroid(encoder_id="b")]
    )
    entry = CatalogEntry(1, "f" * 64, both, True, "e" * 64, 1)
    assert len(AdapterRetriever([entry], encoder_id="a").retrieve(np.zeros(1), 1, 1.0)) == 1
    with pytest.raises(AdapterMismatchError, match="'both' has no centroid of encoder 'c'"):
        AdapterRetriever([entry], encoder_id="c")
    with pytest.raises(AdapterMismatchError, match="'bare' has no centroid"):
        AdapterRetriever(
            [CatalogEntry(1, "f" * 64, make_card("bare", centroids=()), True, "e" * 64, 1)]
        )
