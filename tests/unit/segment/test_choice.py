import math

import numpy as np
import pytest

from loraseg.errors import AdapterNotFoundError, StageError
from loraseg.library import BaseModel, Card, Centroid
from loraseg.library.retrieve import Retriever
from loraseg.library.snapshot import Entry as PublishedEntry
from loraseg.segment.choice import AdaptiveSettings, Choice, Wish, adapters_not_found, choose
from loraseg.segment.pool import AdapterPool
from tests.unit.segment.naive_pool import Entry, NaiveRetriever, softmax_of_inverse

# On a line, so that distances are easy to tell: rain 1, fog 2, snow 4, night 8 from the origin.
PLACES = {"night": 8.0, "rain": 1.0, "snow": 4.0, "fog": 2.0}
ORIGIN = np.zeros((1, 1))


def make_pool():
    entries = [Entry(name, name[0] * 64) for name in PLACES]
    centroids = [np.array([place]) for place in PLACES.values()]
    return AdapterPool(entries, _never, NaiveRetriever(entries, centroids))


def _never(entry):
    raise AssertionError("choosing loads nothing")


def wish(only=(), exclude=(), **settings):
    return Wish(
        settings=AdaptiveSettings(**{"k": 2, "temperature": 1.0, **settings}),
        only=frozenset(only),
        exclude=frozenset(exclude),
    )


def names(choice):
    return [part.entry.name for part in choice.parts]


def test_the_k_nearest_are_chosen_and_weighted_by_the_inverse_of_their_distance():
    [choice] = choose(make_pool(), ORIGIN, [wish(k=3, temperature=0.5)])
    assert names(choice) == ["rain", "fog", "snow"]
    assert [part.distance for part in choice.parts] == [1.0, 2.0, 4.0]
    expected = softmax_of_inverse([1, 2, 4], 0.5)
    assert [part.weight for part in choice.parts] == pytest.approx(expected, rel=1e-12)
    assert choice.fallback is None


def test_only_takes_all_that_are_named_whatever_their_distance_and_k():
    [choice] = choose(make_pool(), ORIGIN, [wish(only={"night", "snow", "rain"}, k=1)])
    assert names(choice) == ["rain", "snow", "night"]
    expected = softmax_of_inverse([1, 4, 8], 1.0)
    assert [part.weight for part in choice.parts] == pytest.approx(expected, rel=1e-12)


def test_only_and_exclude_together_leave_what_is_in_one_and_not_in_the_other():
    [choice] = choose(make_pool(), ORIGIN, [wish(only={"night", "rain"}, exclude={"rain", "fog"})])
    assert names(choice) == ["night"]
    assert choice.parts[0].weight == 1.0


@pytest.mark.parametrize("mode", ["fused", "uniform"])
def test_when_nothing_is_left_the_base_is_used_and_the_reason_said(mode):
    for asked in (wish(exclude=PLACES, mode=mode), wish({"fog"}, {"fog"}, mode=mode)):
        [choice] = choose(make_pool(), ORIGIN, [asked])
        assert choice == Choice(mode, (), "every adapter was excluded")
    empty = AdapterPool((), _never, None, "nothing was published yet")
    assert choose(empty, None, [wish(mode=mode)]) == [Choice(mode, (), "nothing was published yet")]


def test_uniform_weighs_alike_and_measures_nothing():
    everything, named = choose(
        make_pool(), None, [wish(mode="uniform"), wish({"snow", "rain"}, mode="uniform")]
    )
    assert names(everything) == list(PLACES)
    assert names(named) == ["rain", "snow"]
    assert {part.weight for part in everything.parts} == {0.25}
    assert {(part.weight, part.distance) for part in named.parts} == {(0.5, None)}


def test_the_base_alone_needs_nothing_and_gives_no_reason():
    asked = wish(mode="base", only={"a name that nobody published"})
    assert choose(make_pool(), None, [asked]) == [Choice("base")]


@pytest.mark.parametrize("mode", ["fused", "uniform"])
def test_unknown_names_are_told_and_a_near_one_is_proposed(mode):
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'rian' among 4; did you.*'rain'"):
        choose(make_pool(), ORIGIN, [wish(mode="base"), wish({"rian", "fog"}, mode=mode)])
    with pytest.raises(AdapterNotFoundError, match="'n0', 'n1', 'n2', 'n3', 'n4' and 3 more among"):
        choose(make_pool(), ORIGIN, [wish({f"n{i}" for i in range(8)}, mode=mode)])
    empty = AdapterPool((), _never, None)
    with pytest.raises(AdapterNotFoundError, match="no adapter 'rain' among 0"):
        choose(empty, None, [wish({"rain"}, mode=mode)])


def test_an_excluded_name_is_never_proposed():
    with pytest.raises(AdapterNotFoundError, match=r"^no adapter 'rian' among 3$"):
        choose(make_pool(), ORIGIN, [wish({"rian"}, exclude={"rain"})])
    assert str(adapters_not_found(["rian"], ["fog"])) == "no adapter 'rian' among 1"


def test_equal_wishes_share_one_search():
    pool = make_pool()
    asked = [
        wish(),
        wish({"fog", "snow"}),
        wish(),
        wish(k=3),
        wish({"snow", "fog"}, k=7),
        wish(exclude={"rain"}),
        wish(mode="base"),
    ]
    choices = choose(pool, np.repeat(ORIGIN, 7, axis=0), asked)
    assert sorted(pool.retriever.searches) == [1, 1, 2, 2]
    assert [names(choice) for choice in choices] == [
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
    choose(pool, None, [wish(mode="base"), wish(mode="uniform")])
    assert pool.retriever.searches == []


def test_every_image_has_its_embedding():
    for embeddings in (None, np.zeros((2, 1))):
        with pytest.raises(StageError, match="expected one for each of 1 images"):
            choose(make_pool(), embeddings, [wish()])


def test_no_wishes_no_choices():
    assert choose(make_pool(), None, []) == []


@pytest.fixture(scope="module")
def published():
    """Many adapters of several centroids each; some lie exactly alike."""
    generator = np.random.default_rng(5)
    places = generator.normal(size=(30, 6)).round(1)
    places[7] = places[3]
    return AdapterPool(
        entries := [_published(f"a{i}", places[[i, (i * 7) % 30]]) for i in range(30)],
        _never,
        Retriever(entries),
    )


def _published(name, vectors):
    centroids = tuple(
        Centroid(vector=vector, encoder_id="e", normalised=False, count=4, spread=None)
        for vector in vectors
    )
    card = Card(
        name=name,
        role="segmenter",
        base=BaseModel("b", "b" * 64),
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
        wish(
            only=generator.choice(every, size=generator.integers(0, 4), replace=False).tolist(),
            exclude=generator.choice(every, size=2, replace=False).tolist(),
            k=int(generator.integers(1, 4)),
            mode=["fused", "fused", "uniform", "base"][generator.integers(4)],
        )
        for _ in embeddings
    ]
    together = choose(published, embeddings, asked)
    for embedding, one, choice in zip(embeddings, asked, together, strict=True):
        assert choose(published, embedding[None], [one]) == [choice]


def test_named_adapters_have_the_distances_and_weights_of_the_formula(published):
    embedding = np.random.default_rng(7).normal(size=(1, 6))
    asked = {"a3", "a7", "a12", "a29"}
    [choice] = choose(published, embedding, [wish(asked, temperature=0.3)])
    distances = published.retriever.distances(embedding)[0]
    by_name = dict(zip((e.name for e in published.entries), distances, strict=True))
    expected = sorted(asked, key=lambda name: (by_name[name], int(name[1:])))
    assert names(choice) == expected
    assert [part.distance for part in choice.parts] == [by_name[name] for name in expected]
    weights = softmax_of_inverse([by_name[name] for name in expected], 0.3)
    assert [part.weight for part in choice.parts] == pytest.approx(weights, rel=1e-12)
    assert math.fsum(part.weight for part in choice.parts) == pytest.approx(1, abs=1e-12)
