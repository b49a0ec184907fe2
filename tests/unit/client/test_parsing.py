import contextlib
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraseg.client.images import prepare_upload
from loraseg.client.parsing import (
    JsonObject,
    parse_json,
    parse_segment_response,
    problem_error,
    response_error,
    sanitise,
)
from loraseg.client.retry import RetryableError
from loraseg.errors import ServiceError
from tests.unit.client.sample_response import CLASSES, IMAGE, LABELS, SHAPE, png64, sample_response


def parse(**changes):
    return parse_segment_response(
        JsonObject(json.loads(json.dumps(sample_response(**changes)))), prepare_upload(IMAGE), 3
    )


def test_a_reply_becomes_arrays_and_values():
    levels = np.arange(24, dtype=np.uint8).reshape(SHAPE) * 11
    reply = parse(confidence=png64(levels))
    assert reply.label_map.dtype == np.uint8
    assert (reply.label_map == LABELS).all()
    assert reply.class_names == CLASSES
    assert reply.palette.tolist() == sample_response()["palette"]
    assert reply.confidence.dtype == np.float32
    assert np.abs(reply.confidence * 255.0 - levels).max() < 1e-5
    assert reply.entropy is None
    [used] = reply.adapters
    assert (used.name, used.version, used.weight, used.distance) == ("rain", 3, 1.0, 0.25)
    assert [skipped.reason for skipped in reply.skipped] == ["its file is damaged"]
    assert (reply.generation, reply.fallback, reply.mode) == (7, None, "fused")
    assert reply.timing_ms["total"] == 4.0


def test_a_base_reply_has_nothing_about_adapters():
    reply = parse(mode="base", generation=None, mix=None, adapters=[], skipped=[])
    assert (reply.generation, reply.mix, reply.adapters) == (None, None, ())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"segmentation_mask": None}, "segmentation_mask: got None, expected a PNG"),
        ({"segmentation_mask": "%%"}, "segmentation_mask: "),
        ({"segmentation_mask": png64(LABELS)[:-40]}, "segmentation_mask: "),
        ({"segmentation_mask": png64(LABELS.T.copy())}, "4 x 6"),
        ({"segmentation_mask": png64(np.zeros((9000, 9000), np.uint8))}, "9000 x 9000"),
        ({"segmentation_mask": png64(IMAGE)}, "mode RGB"),
        ({"segmentation_mask": png64(LABELS + 1)}, "id 3 of 3 classes"),
        ({"confidence": png64(LABELS[:2])}, "confidence: "),
        ({"classes": ["road"]}, "classes: got 1, expected 3"),
        ({"classes": ["road", 3, "sky"]}, "classes: "),
        ({"palette": [[1, 2, 3]]}, "palette: got shape"),
        ({"palette": [[1, 2, 300]] * 3}, "palette: "),
        ({"palette": [[1, 2], [1], []]}, "palette: "),
        ({"palette": "red"}, "palette: got 'red', expected a list"),
        ({"adapters": {}}, "adapters: got {}, expected a list"),
        ({"adapters": [3]}, "adapters: got int, expected object"),
        ({"adapters": [{"name": "x"}]}, "adapters.version"),
        ({"generation": "new"}, "generation: got 'new', expected a whole number"),
        ({"generation": True}, "generation: "),
        ({"tiles": 1.5}, "tiles: "),
        ({"timing_ms": {"total": "slow"}}, "timing_ms.total"),
        ({"timing_ms": {"total": 10**400}}, "timing_ms.total"),
        ({"mode": ["fused"]}, "mode: "),
        ({"request_id": None}, "request_id: "),
    ],
)
def test_what_does_not_belong_to_the_question_is_refused(changes, reason):
    with pytest.raises(ServiceError, match="the endpoint's answer cannot be used") as caught:
        parse(**changes)
    assert caught.value.code == "bad_reply"
    assert reason in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(sample_response())), VALUES, max_size=3))
def test_no_reply_causes_anything_but_a_reply_or_a_service_error(changes):
    with contextlib.suppress(ServiceError):
        reply = parse(**changes)
        assert reply.label_map.shape == SHAPE
        assert all(math.isfinite(used.weight) for used in reply.adapters)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff\xfe", b"[" * 200_000, b"1" * 9999],
)
def test_what_is_not_json_is_refused(body):
    with pytest.raises(ServiceError, match="not JSON") as caught:
        parse_json(body)
    assert caught.value.code == "bad_reply"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_problems_keep_their_code_and_words():
    details = {"status": 422, "code": "bad_image", "detail": "cut off", "request_id": "r9"}
    error = problem_error(JsonObject(details))
    assert (error.code, str(error)) == ("bad_image", "cut off")
    assert not isinstance(error, RetryableError)
    busy = problem_error(JsonObject({**details, "status": 503, "code": "overloaded"}), 3.0)
    assert isinstance(busy, RetryableError)
    assert busy.retry_after_s == 3.0


def test_a_fault_of_the_endpoint_names_the_request():
    details = {"status": 500, "code": "internal", "detail": "A fault.", "request_id": "r9"}
    assert str(problem_error(JsonObject(details))) == "A fault. (request r9)"


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "not_found"), (503, "overloaded"), (504, "deadline"), (302, "bad_reply")],
)
def test_what_is_said_by_something_else_is_known_by_its_status(status, code):
    error = response_error(status, b"<html>nginx</html>", None)
    assert error.code == code
    assert f"HTTP status {status}" in str(error)
    assert isinstance(error, RetryableError) == (status == 503)


def test_an_endpoint_cannot_steer_the_terminal():
    assert sanitise("\x1b[31mred\r\n\u202e") == "\ufffd[31mred\ufffd\ufffd\ufffd"
    assert len(sanitise("x" * 10**6)) < 2100
