import numpy as np
import pytest

from loraseg.errors import IntegrityError
from loraseg.library import AdapterCard, BaseModelInfo, Centroid, TrainingSet
from loraseg.storage.json_io import canonical_json
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


def test_bytes_are_pinned():
    """Records contain them, and digests of records are in every catalog."""
    card = AdapterCard(
        name="fog",
        role="segmenter",
        base=BaseModelInfo("tiny", "b" * 64),
        label_space=("Straße", "sky"),
        centroids=(Centroid("enc", False, np.array([0.1, 1e-7, 3.0]), 4, 0.5),),
        recipe={"lr": 1e-05, "steps": 4, "none": None, "on": True},
        training=TrainingSet("c" * 64, 7),
        metrics={"miou": 0.41},
        code_revision="r1",
        parents=("d" * 64,),
    )
    text = (
        '{"base":{"digest":"%s","name":"tiny"},"centroids":[{"count":4,"encoder_id":"enc",'
        '"normalised":false,"spread":0.5,"vector":[0.1,1e-07,3.0]}],"code_revision":"r1",'
        '"label_space":["Stra\\u00dfe","sky"],"metrics":{"miou":0.41},"name":"fog",'
        '"parents":["%s"],"recipe":{"lr":1e-05,"none":null,"on":true,"steps":4},'
        '"role":"segmenter","schema":1,"training":{"digest":"%s","images":7}}'
    )
    assert card.to_bytes().decode() == text % ("b" * 64, "d" * 64, "c" * 64)


def test_bytes_do_not_depend_on_the_order_of_keys():
    one = AdapterCard(name="a", role="segmenter", base=BASE, recipe={"x": 1, "y": 2})
    two = AdapterCard(name="a", role="segmenter", base=BASE, recipe={"y": 2, "x": 1})
    assert one.to_bytes() == two.to_bytes()


def changed_card(**change):
    return AdapterCard.from_bytes(canonical_json({**make_card("a").to_json(), **change}))


def test_unknown_fields_are_ignored_and_newer_schemas_refused():
    assert changed_card(licence="CC0") == make_card("a")
    with pytest.raises(IntegrityError, match="schema 2; this version of loraseg reads 1"):
        changed_card(schema=2)


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
        ({"name": 3}, "card: name: got 3, expected a valid string"),
        ({"role": "painter"}, "role: got 'painter', expected 'segmenter'"),
        ({"base": None}, "base: got None, expected"),
        ({"base": {"name": "m", "digest": "B" * 64}}, "base: digest .*64 hex digits"),
        ({"base": {"name": "m", "digest": "../" * 20}}, "64 hex digits"),
        ({"label_space": "road"}, "label_space: got 'road', expected a valid"),
        ({"label_space": ["a", 1]}, "label_space.1: got 1, expected a valid string"),
        ({"label_space": ["a", "a"]}, "twice in label_space"),
        ({"label_space": [str(i) for i in range(65_537)]}, "65537 classes"),
        ({"centroids": [1]}, "centroids.0: got 1, expected"),
        ({"recipe": []}, "recipe: got .*, expected"),
        (
            {"training": {"digest": "c" * 64, "images": True}},
            "training.images: got True, expected a valid integer",
        ),
        ({"training": {"digest": "c" * 64, "images": -1}}, "-1 images"),
        ({"parents": ["x"]}, "parent: digest 'x'"),
    ],
)
def test_hostile_json(change, message):
    with pytest.raises(IntegrityError, match=message):
        changed_card(**change)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"\xff", b'{"schema":NaN}', b"[" * 200_000, b" " * 5_000_000],
    ids=["empty", "list", "cut", "not UTF-8", "NaN", "deep", "large"],
)
def test_hostile_bytes(data):
    with pytest.raises(IntegrityError, match="card"):
        AdapterCard.from_bytes(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}, {"a": {3}}])
def test_values_must_be_json(value):
    with pytest.raises(IntegrityError, match="metrics"):
        AdapterCard(name="a", role="segmenter", base=BASE, metrics={"x": value})


def test_large_cards_are_rejected():
    card = AdapterCard(name="a", role="segmenter", base=BASE, recipe={"text": "x" * 5_000_000})
    with pytest.raises(IntegrityError, match="at most 4194304"):
        card.to_bytes()


def test_fields_are_checked():
    with pytest.raises(IntegrityError, match="base: digest"):
        BaseModelInfo("m", "short")
    with pytest.raises(IntegrityError, match="-2 images"):
        TrainingSet("c" * 64, -2)
