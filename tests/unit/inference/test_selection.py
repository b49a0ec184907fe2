import math

import numpy as np
import pytest

from loraseg.errors import AdapterNotFoundError, StageError
from loraseg.inference.adapter_cache import AdapterPool
from loraseg.inference.selection import (
    AdapterQuery,
    AdapterSelection,
    AdaptiveSettings,
    adapter_not_found_error,
    select_adapters,
)
from loraseg.library import AdapterCard, BaseModelInfo, Centroid
from loraseg.library.retrieve import AdapterRetriever
from loraseg.library.snapshot import CatalogEntry as PublishedEntry
from tests.unit.inference.naive_retriever import Entry, NaiveRetriever, softmax_of_inverse

# Centroids on a line, at distances 1 (rain), 2 (fog), 4 (snow) and 8 (night) from the origin.
POSITIONS = {"night": 8.0, "rain": 1.0, "snow": 4.0, "fog": 2.0}
ORIGIN = np.zeros((1, 1))


def make_pool():
    entries = [Entry(name, name[0] * 64) for name in POSITIONS]
    centroids = [np.array([position]) for position in POSITIONS.values()]
    return AdapterPool(entries, _never, NaiveRetriever(entries, centroids))


def _never(entry):
    raise AssertionError("selecting loads nothing")


def make_query(only=(), exclude=(), **settings):
    return AdapterQuery(
        settings=AdaptiveSettings(**{"k": 2, "temperature": 1.0, **settings}),
        only=frozenset(only),
        exclude=frozenset(exclude),
    )


def adapter_names(selection):
    return [part.entry.name for part in selection.adapters]


def test_the_k_nearest_are_selected_and_weighted_by_inverse_distance():
    [selection] = select_adapters(make_pool(), ORIGIN, [make_query(k=3, temperature=0.5)])
    assert adapter_names(selection) == ["rain", "fog", "snow"]
    assert [part.distance for part in selection.adapters] == [1.0, 2.0, 4.0]
    expected = softmax_of_inverse([1, 2, 4], 0.5)
    assert [part.weight for part in selection.adapters] == pytest.approx(expected, rel=1e-12)
    assert selection.fallback is None


def test_only_selects_all_named_adapters_regardless_of_distance_and_k():
    [selection] = select_adapters(
        make_pool(), ORIGIN, [make_query(only={"night", "snow", "rain"}, k=1)]
    )
    assert adapter_names(selection) == ["rain", "snow", "night"]
    expected = softmax_of_inverse([1, 4, 8], 1.0)
    assert [part.weight for part in selection.adapters] == pytest.approx(expected, rel=1e-12)


def test_only_and_exclude_combine_to_the_difference():
    [selection] = select_adapters(
        make_pool(), ORIGIN, [make_query(only={"night", "rain"}, exclude={"rain", "fog"})]
    )
    assert adapter_names(selection) == ["night"]
    assert selection.adapters[0].weight == 1.0


@pytest.mark.parametrize("mode", ["fused", "uniform"])
def test_without_adapters_the_base_is_used_with_a_reason(mode):
    for queries in (
        make_query(exclude=POSITIONS, mode=mode),
        make_query({"fog"}, {"fog"}, mode=mode),
    ):
        [selection] = select_adapters(make_pool(), ORIGIN, [queries])
        assert selection == AdapterSelection(mode, (), "every adapter was excluded")
    empty = AdapterPool((), _never, None, "no adapter is published")
    assert select_adapters(empty, None, [make_query(mode=mode)]) == [
        AdapterSelection(mode, (), "no adapter is published")
    ]


def test_uniform_gives_equal_weights_without_distances():
    everything, named = select_adapters(
        make_pool(),
        None,
        [make_query(mode="uniform"), make_query({"snow", "rain"}, mode="uniform")],
    )
    assert adapter_names(everything) == list(POSITIONS)
    assert adapter_names(named) == ["rain", "snow"]
    assert {part.weight for part in everything.adapters} == {0.25}
    assert {(part.weight, part.distance) for part in named.adapters} == {(0.5, None)}


def test_mode_base_needs_no_embedding_and_gives_no_reason():
    queries = make_query(mode="base", only={"an unpublished name"})
    assert select_adapters(make_pool(), None, [queries]) == [AdapterSelection("base")]


@pytest.mark.parametrize("mode", ["fused", "uniform"])
def test_unknown_names_are_reported_with_a_similar_name(mode):
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'rian' among 4; did you.*'rain'"):
        select_adapters(
            make_pool(), ORIGIN, [make_query(mode="base"), make_query({"rian", "fog"}, mode=mode)]
        )
    with pytest.raises(AdapterNotFoundError, match="'n0', 'n1', 'n2', 'n3', 'n4' and 3 more among"):
        select_adapters(make_pool(), ORIGIN, [make_query({f"n{i}" for i in range(8)}, mode=mode)])
    empty = AdapterPool((), _never, None)
    with pytest.raises(AdapterNotFoundError, match="no adapter 'rain' among 0"):
        select_adapters(empty, None, [make_query({"rain"}, mode=mode)])


def test_an_excluded_name_is_never_suggested():
    with pytest.raises(AdapterNotFoundError, match=r"^no adapter 'rian' among 3$"):
        select_adapters(make_pool(), ORIGIN, [make_query({"rian"}, exclude={"rain"})])
    assert str(adapter_not_found_error(["rian"], ["fog"])) == "no adapter 'rian' among 1"


def test_equal_queries_share_one_search():
    pool = make_pool()
    queries = [
        make_query(),
        make_query({"fog", "snow"}),
        make_query(),
        make_query(k=3),
        make_query({"snow", "fog"}, k=7),
        make_query(exclude={"rain"}),
        make_query(mode="base"),
    ]
    selections = select_adapters(pool, np.repeat(ORIGIN, 7, axis=0), queries)
    assert sorted(pool.retriever.searches) == [1, 1, 2, 2]
    assert [adapter_names(selection) for selection in selections] == [
        ["rain", "fog"],
        ["fog", "snow"],
        ["rain", "fog"],
        ["rain", "fog", "snow"],
        ["fog", "snow"],
        ["fog", "snow"],
        [],
    ]


def test_modes_without_distances_do_not_search():
    pool = make_pool()
    select_adapters(pool, None, [make_query(mode="base"), make_query(mode="uniform")])
    assert pool.retriever.searches == []


def test_a_wrong_number_of_embeddings_is_refused():
    for embeddings in (None, np.zeros((2, 1))):
        with pytest.raises(StageError, match="expected one for each of 1 images"):
            select_adapters(make_pool(), embeddings, [make_query()])


def test_no_queries_give_no_selections():
    assert select_adapters(make_pool(), None, []) == []


@pytest.fixture(scope="module")
def published():
    """Many adapters with several centroids each, some of them equal."""
    generator = np.random.default_rng(5)
    vectors = generator.normal(size=(30, 6)).round(1)
    vectors[7] = vectors[3]
    return AdapterPool(
        entries := [_published(f"a{i}", vectors[[i, (i * 7) % 30]]) for i in range(30)],
        _never,
        AdapterRetriever(entries),
    )


def _published(name, vectors):
    centroids = tuple(
        Centroid(vector=vector, encoder_id="e", normalised=False, count=4, spread=None)
        for vector in vectors
    )
    card = AdapterCard(
        name=name,
        role="segmenter",
        base=BaseModelInfo("b", "b" * 64),
        label_space=("x",),
        centroids=centroids,
    )
    return PublishedEntry(
        version=1,
        digest="d" * 64,
        card=card,
        current=True,
        record_digest="e" * 64,
        size_bytes=1,
    )


def test_a_selection_does_not_depend_on_the_other_queries(published):
    generator = np.random.default_rng(6)
    embeddings = generator.normal(size=(24, 6))
    every = [entry.name for entry in published.entries]
    queries = [
        make_query(
            only=generator.choice(every, size=generator.integers(0, 4), replace=False).tolist(),
            exclude=generator.choice(every, size=2, replace=False).tolist(),
            k=int(generator.integers(1, 4)),
            mode=["fused", "fused", "uniform", "base"][generator.integers(4)],
        )
        for _ in embeddings
    ]
    together = select_adapters(published, embeddings, queries)
    for embedding, one, selection in zip(embeddings, queries, together, strict=True):
        assert select_adapters(published, embedding[None], [one]) == [selection]


def test_named_adapters_have_the_distances_and_weights_of_the_formula(published):
    embedding = np.random.default_rng(7).normal(size=(1, 6))
    queries = {"a3", "a7", "a12", "a29"}
    [selection] = select_adapters(published, embedding, [make_query(queries, temperature=0.3)])
    distances = published.retriever.distances(embedding)[0]
    by_name = dict(zip((e.name for e in published.entries), distances, strict=True))
    expected = sorted(queries, key=lambda name: (by_name[name], int(name[1:])))
    assert adapter_names(selection) == expected
    assert [part.distance for part in selection.adapters] == [by_name[name] for name in expected]
    weights = softmax_of_inverse([by_name[name] for name in expected], 0.3)
    assert [part.weight for part in selection.adapters] == pytest.approx(weights, rel=1e-12)
    assert math.fsum(part.weight for part in selection.adapters) == pytest.approx(1, abs=1e-12)
