import json

import pytest

from loraseg.adapters.targets import layer_report
from loraseg.adapters.targets.layer_report import LayerReport, LayerScore
from loraseg.adapters.targets.unet import Projection
from loraseg.errors import ConfigError, IntegrityError

PROJECTION = Projection(
    name="mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
    attention="mid_block.attentions.0.transformer_blocks.0.attn2",
    block="mid_block",
    cross=True,
    part="q",
    factor=8,
    d_in=16,
    d_out=16,
)


def make(by_name, **changes):
    values = {
        "method": "gradient",
        "base_name": "tiny",
        "base_digest": "ab" * 32,
        "scores": tuple(
            LayerScore(name=name, score=score, history=(score, score / 2), numel=4)
            for name, score in by_name.items()
        ),
        "samples": {"images": 8, "epochs": 2},
        "settings": {"lr": 1e-5, "stop": "jaccard", "seeds": [1, 2], "mask": True, "cap": None},
    }
    return LayerReport(**(values | changes))


@pytest.fixture
def report():
    return make({"b": 0.5, "a": 0.5, "d": 2.0, "c": 0.0})


def changed(report, **changes):
    values = json.loads(report.to_bytes()) | changes
    return encode(values)


def encode(values):
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_ranking_is_by_falling_score_then_name(report):
    assert [score.name for score in report.scores] == ["d", "a", "b", "c"]
    assert report.top(2) == ("d", "a")
    for k in (0, 5):
        with pytest.raises(ConfigError, match=f"k = {k}, expected 1 to 4"):
            report.top(k)


def test_bytes_are_canonical(report):
    again = make({"c": 0.0, "d": 2.0, "a": 0.5, "b": 0.5})
    assert again.to_bytes() == report.to_bytes()
    assert LayerReport.from_bytes(report.to_bytes()) == report
    assert LayerReport.from_bytes(report.to_bytes()).to_bytes() == report.to_bytes()
    assert report.to_bytes().endswith(b"}\n")


def test_kind_of_projections_is_kept():
    score = LayerScore.from_projection(PROJECTION, 1.0, [0.5, 1.0])
    plain = LayerScore(name="time_embedding.linear_1", score=3.0, numel=9)
    report = make({}, scores=(score, plain))
    again = LayerReport.from_bytes(report.to_bytes())
    assert again.scores == (plain, score)
    assert [row.is_projection for row in again.scores] == [False, True]
    assert again.scores[1].numel == 256
    assert again.projections().scores == (score,)
    with pytest.raises(ConfigError, match="0 layers with 0 names"):
        make({"a": 1.0}).projections()


def test_overlap_is_the_jaccard_index_of_the_top_sets(report):
    other = make({"a": 9.0, "b": 8.0, "c": 7.0, "d": 0.0})
    assert report.overlap(report, 3) == 1.0
    assert report.overlap(other, 1) == 0.0
    assert report.overlap(other, 2) == pytest.approx(1 / 3)
    assert report.overlap(other, 3) == other.overlap(report, 3) == 0.5
    with pytest.raises(ConfigError, match="not the same"):
        report.overlap(make({"a": 1.0}), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": ()}, "0 layers with 0 names"),
        ({"base_digest": "xy"}, "expected 64 hex digits"),
        ({"method": ""}, "method ''"),
        ({"base_name": "a\nb"}, "printable characters"),
        ({"settings": {"deep": {"a": 1}}}, "setting 'deep'"),
        ({"settings": {"lr": float("nan")}}, "setting 'lr' is nan"),
    ],
)
def test_a_report_is_checked_when_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        make({"a": 1.0}, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": -1.0}, "expected a finite number from 0"),
        ({"history": (float("inf"),)}, "expected a finite number from 0"),
        ({"name": "a..b"}, "not a dotted module name"),
        ({"name": "a b"}, "not a dotted module name"),
        ({"numel": 0}, "numel 0"),
        ({"block": "mid_block"}, "expected all of a projection"),
    ],
)
def test_a_layer_is_checked_when_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        LayerScore(**({"name": "a", "score": 1.0, "numel": 1} | changes))


def test_no_layer_twice():
    row = LayerScore(name="a", score=1.0, numel=1)
    with pytest.raises(ConfigError, match="2 layers with 1 names"):
        make({}, scores=(row, row))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"extra": 1},
        {"scores": {}},
        {"scores": [1]},
        {"scores": []},
        {"method": 3},
        {"base_digest": None},
        {"samples": {"images": 1.5}},
        {"samples": {"images": True}},
        {"samples": [1]},
        {"samples": {"\x1b[2J": 1}},
        {"settings": [1]},
        {"settings": {"\ud800": 1}},
        {"settings": {"": 1}},
        {"settings": {"a": [[1]]}},
    ],
)
def test_strange_reports_are_refused(report, changes):
    with pytest.raises(IntegrityError, match="layer report"):
        LayerReport.from_bytes(changed(report, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 1},
        {"name": "../x"},
        {"score": "1"},
        {"score": 1},
        {"score": True},
        {"score": -1.0},
        {"history": None},
        {"history": ["a"]},
        {"history": [[1.0]]},
        {"numel": 1.0},
        {"numel": -1},
        {"cross": 1},
        {"part": "z"},
        {"part": "q"},
        {"factor": "8"},
        {"more": 1},
    ],
)
def test_strange_layers_are_refused(report, changes):
    rows = json.loads(report.to_bytes())["scores"]
    rows[0] |= changes
    with pytest.raises(IntegrityError, match="layer report"):
        LayerReport.from_bytes(changed(report, scores=rows))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"],
    ids=["empty", "no text", "list", "null", "deep", "long number"],
)
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(IntegrityError, match="layer report"):
        LayerReport.from_bytes(data)


def test_only_the_canonical_form_is_read(report):
    data = report.to_bytes()
    values = json.loads(data)
    values["scores"].reverse()
    unsorted = encode(values)
    spaced = json.dumps(json.loads(data), sort_keys=True).encode()
    doubled = data.replace(b'{"base_digest"', b'{"method":"other","base_digest"', 1)
    endless = data.replace(b'"score":2.0', b'"score":Infinity')
    for strange in (unsorted, spaced, doubled, endless, data + b" "):
        assert strange != data
        with pytest.raises(IntegrityError, match="layer report"):
            LayerReport.from_bytes(strange)


def test_size_is_bounded(report, monkeypatch):
    monkeypatch.setattr(layer_report, "MAX_REPORT_BYTES", 100)
    with pytest.raises(IntegrityError, match="expected at most 100"):
        LayerReport.from_bytes(report.to_bytes())
