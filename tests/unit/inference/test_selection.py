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

# On a line, so that distances are easy to tell: rain 1, fog 2, snow 4, night 8 from the origin.
POSITIONS = {"night": 8.0, "rain": 1.0, "snow": 4.0, "fog": 2.0}
ORIGIN = np.zeros((1, 1))


def make_pool():
    entries = [Entry(name, name[0] * 64) for name in POSITIONS]
    centroids = [np.array([place]) for place in POSITIONS.values()]
    return AdapterPool(entries, _never, NaiveRetriever(entries, centroids))


def _never(entry):
    raise AssertionError("choosing loads nothing")


def make_query(only=(), exclude=(), **settings):
    return AdapterQuery(
        settings=AdaptiveSettings(**{"k": 2, "temperature": 1.0, **settings}),
        only=frozenset(only),
        exclude=frozenset(exclude),
    )


def adapter_names(choice):
    return [part.entry.name for part in choice.adapters]


def test_the_k_nearest_are_chosen_and_weighted_by_the_inverse_of_their_distance():
    [choice] = select_adapters(make_pool(), ORIGIN, [make_query(k=3, temperature=0.5)])
    assert adapter_names(choice) == ["rain", "fog", "snow"]
    assert [part.distance for part in choice.adapters] == [1.0, 2.0, 4.0]
    expected = softmax_of_inverse([1, 2, 4], 0.5)
    assert [part.weight for part in choice.adapters] == pytest.approx(expected, rel=1e-12)
    assert choice.fallback is None


def test_only_takes_all_that_are_named_whatever_their_distance_and_k():
    [choice] = select_adapters(
        make_pool(), ORIGIN, [make_query(only={"night", "snow", "rain"}, k=1)]
    )
    assert adapter_names(choice) == ["rain", "snow", "night"]
    expected = softmax_of_inverse([1, 4, 8], 1.0)
    assert [part.weight for part in choice.adapters] == pytest.approx(expected, rel=1e-12)


def test_only_and_exclude_together_leave_what_is_in_one_and_not_in_the_other():
    [choice] = select_adapters(
        make_pool(), ORIGIN, [make_query(only={"night", "rain"}, exclude={"rain", "fog"})]
    )
    assert adapter_names(choice) == ["night"]
    assert choice.adapters[0].weight == 1.0


@pytest.mark.parametrize("mode", ["fused", "uniform"])
def test_when_nothing_is_left_the_base_is_used_and_the_reason_said(mode):
    for asked in (
        make_query(exclude=POSITIONS, mode=mode),
        make_query({"fog"}, {"fog"}, mode=mode),
    ):
        [choice] = select_adapters(make_pool(), ORIGIN, [asked])
        assert choice == AdapterSelection(mode, (), "every adapter was excluded")
    empty = AdapterPool((), _never, None, "nothing was published yet")
    assert select_adapters(empty, None, [make_query(mode=mode)]) == [
        AdapterSelection(mode, (), "nothing was published yet")
    ]


def test_uniform_weighs_alike_and_measures_nothing():
    everything, named = select_adapters(
        make_pool(),
        None,
        [make_query(mode="uniform"), make_query({"snow", "rain"}, mode="uniform")],
    )
    assert adapter_names(everything) == list(POSITIONS)
    assert adapter_names(named) == ["rain", "snow"]
    assert {part.weight for part in everything.adapters} == {0.25}
    assert {(part.weight, part.distance) for part in named.adapters} == {(0.5, None)}


def test_the_base_alone_needs_nothing_and_gives_no_reason():
    asked = make_query(mode="base", only={"a name that nobody published"})
    assert select_adapters(make_pool(), None, [asked]) == [AdapterSelection("base")]


@pytest.mark.parametrize("mode", ["fused", "uniform"])
def test_unknown_names_are_told_and_a_near_one_is_proposed(mode):
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'rian' among 4; did you.*'rain'"):
        select_adapters(
            make_pool(), ORIGIN, [make_query(mode="base"), make_query({"rian", "fog"}, mode=mode)]
        )
    with pytest.raises(AdapterNotFoundError, match="'n0', 'n1', 'n2', 'n3', 'n4' and 3 more among"):
        select_adapters(make_pool(), ORIGIN, [make_query({f"n{i}" for i in range(8)}, mode=mode)])
    empty = AdapterPool((), _never, None)
    with pytest.raises(AdapterNotFoundError, match="no adapter 'rain' among 0"):
        select_adapters(empty, None, [make_query({"rain"}, mode=mode)])


def test_an_excluded_name_is_never_proposed():
    with pytest.raises(AdapterNotFoundError, match=r"^no adapter 'rian' among 3$"):
        select_adapters(make_pool(), ORIGIN, [make_query({"rian"}, exclude={"rain"})])
    assert str(adapter_not_found_error(["rian"], ["fog"])) == "no adapter 'rian' among 1"


def test_equal_wishes_share_one_search():
    pool = make_pool()
    asked = [
        make_query(),
        make_query({"fog", "snow"}),
        make_query(),
        make_query(k=3),
        make_query({"snow", "fog"}, k=7),
        make_query(exclude={"rain"}),
        make_query(mode="base"),
    ]
    choices = select_adapters(pool, np.repeat(ORIGIN, 7, axis=0), asked)
    assert sorted(pool.retriever.searches) == [1, 1, 2, 2]
    assert [adapter_names(choice) for choice in choices] == [
        ["rain", "fog"],
        ["fog", "snow"],
        ["rain", "fog"],
        ["rain", "fog", "snow"],
        ["fog", "snow"],
        ["fog", "snow"],
        [],
    ]


def test_modes_that_measure_nothing_search_nothing():
    pool = make_pool()
    select_adapters(pool, None, [make_query(mode="base"), make_query(mode="uniform")])
    assert pool.retriever.searches == []


def test_every_image_has_its_embedding():
    for embeddings in (None, np.zeros((2, 1))):
        with pytest.raises(StageError, match="expected one for each of 1 images"):
            select_adapters(make_pool(), embeddings, [make_query()])


def test_no_wishes_no_choices():
    assert select_adapters(make_pool(), None, []) == []


@pytest.fixture(scope="module")
def published():
    """Many adapters of several centroids each; some lie exactly alike."""
    generator = np.random.default_rng(5)
    places = generator.normal(size=(30, 6)).round(1)
    places[7] = places[3]
    return AdapterPool(
        entries := [_published(f"a{i}", places[[i, (i * 7) % 30]]) for i in range(30)],
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


def test_the_company_of_a_wish_changes_nothing(published):
    generator = np.random.default_rng(6)
    embeddings = generator.normal(size=(24, 6))
    every = [entry.name for entry in published.entries]
    asked = [
        make_query(
            only=generator.choice(every, size=generator.integers(0, 4), replace=False).tolist(),
            exclude=generator.choice(every, size=2, replace=False).tolist(),
            k=int(generator.integers(1, 4)),
            mode=["fused", "fused", "uniform", "base"][generator.integers(4)],
        )
        for _ in embeddings
    ]
    together = select_adapters(published, embeddings, asked)
    for embedding, one, choice in zip(embeddings, asked, together, strict=True):
        assert select_adapters(published, embedding[None], [one]) == [choice]


def test_named_adapters_have_the_distances_and_weights_of_the_formula(published):
    embedding = np.random.default_rng(7).normal(size=(1, 6))
    asked = {"a3", "a7", "a12", "a29"}
    [choice] = select_adapters(published, embedding, [make_query(asked, temperature=0.3)])
    distances = published.retriever.distances(embedding)[0]
    by_name = dict(zip((e.name for e in published.entries), distances, strict=True))
    expected = sorted(asked, key=lambda name: (by_name[name], int(name[1:])))
    assert adapter_names(choice) == expected
    assert [part.distance for part in choice.adapters] == [by_name[name] for name in expected]
    weights = softmax_of_inverse([by_name[name] for name in expected], 0.3)
    assert [part.weight for part in choice.adapters] == pytest.approx(weights, rel=1e-12)
    assert math.fsum(part.weight for part in choice.adapters) == pytest.approx(1, abs=1e-12)
