import pytest

from loraseg.errors import IntegrityError
from loraseg.library import AdapterCard, BaseModelInfo, TrainingSet
from tests.unit.library.sample_adapters import BASE, make_card


@pytest.mark.parametrize(
    "card",
    [
        make_card("fog-light", parents=("a" * 64,), code_revision="0.1"),
        AdapterCard(name="0", role="generator", base=BASE),
        make_card("x.y_z", centroids=()),
    ],
)
def test_round_trip(card):
    assert AdapterCard.from_bytes(card.to_bytes()) == card
    assert AdapterCard.from_bytes(card.to_bytes()).to_bytes() == card.to_bytes()


def test_bytes_do_not_depend_on_the_order_of_keys():
    one = AdapterCard(name="a", role="segmenter", base=BASE, recipe={"x": 1, "y": 2})
    two = AdapterCard(name="a", role="segmenter", base=BASE, recipe={"y": 2, "x": 1})
    assert one.to_bytes() == two.to_bytes()


def test_unknown_fields_are_ignored_and_newer_schemas_refused():
    values = make_card("a").to_json()
    assert AdapterCard.from_json({**values, "licence": "CC0"}) == make_card("a")
    with pytest.raises(IntegrityError, match="schema 2; this version of loraseg reads 1"):
        AdapterCard.from_json({**values, "schema": 2})


@pytest.mark.parametrize(
    "name",
    ["", "A", "-a", ".a", "..", "a/b", "a\\b", "a b", "a\n", "a\0", "ä", "x" * 129, "../../etc"],
)
def test_hostile_names(name):
    with pytest.raises(IntegrityError, match="adapter name"):
        make_card(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name: expected text, got int"),
        ({"role": "painter"}, "role 'painter'"),
        ({"base": None}, "base: expected an object"),
        ({"base": {"name": "m", "digest": "B" * 64}}, "base: digest .*64 hex digits"),
        ({"base": {"name": "m", "digest": "../" * 20}}, "64 hex digits"),
        ({"label_space": "road"}, "label_space: expected a list"),
        ({"label_space": ["a", 1]}, "label_space: expected a list of texts"),
        ({"label_space": ["a", "a"]}, "twice in label_space"),
        ({"label_space": [str(i) for i in range(65_537)]}, "65537 classes"),
        ({"centroids": [1]}, "centroid: expected an object"),
        ({"recipe": []}, "recipe: expected an object"),
        ({"training": {"digest": "c" * 64, "images": True}}, "training images"),
        ({"training": {"digest": "c" * 64, "images": -1}}, "-1 images"),
        ({"parents": ["x"]}, "parent: digest 'x'"),
    ],
)
def test_hostile_json(change, message):
    with pytest.raises(IntegrityError, match=message):
        AdapterCard.from_json({**make_card("a").to_json(), **change})


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"\xff", b'{"schema":NaN}', b"[" * 200_000, b" " * 5_000_000],
    ids=["empty", "list", "cut", "not UTF-8", "NaN", "deep", "large"],
)
def test_hostile_bytes(data):
    with pytest.raises(IntegrityError, match="card"):
        AdapterCard.from_bytes(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}, {"a": {3}}])
def test_only_json_goes_in(value):
    with pytest.raises(IntegrityError, match="metrics"):
        AdapterCard(name="a", role="segmenter", base=BASE, metrics={"x": value})


def test_a_card_of_unbounded_size_is_refused():
    card = AdapterCard(name="a", role="segmenter", base=BASE, recipe={"text": "x" * 5_000_000})
    with pytest.raises(IntegrityError, match="at most 4194304"):
        card.to_bytes()


def test_parts_are_checked():
    with pytest.raises(IntegrityError, match="base: digest"):
        BaseModelInfo("m", "short")
    with pytest.raises(IntegrityError, match="-2 images"):
        TrainingSet("c" * 64, -2)
