import contextlib
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraseg.api_types import Problem, printable
from loraseg.client.images import prepare_upload
from loraseg.client.parsing import (
    parse_object,
    parse_segment_response,
    problem_error,
    response_error,
)
from loraseg.client.retry import RetryableError
from loraseg.errors import ServiceError
from tests.unit.client.sample_response import CLASSES, IMAGE, LABELS, SHAPE, png64, sample_response


def parse(**changes):
    body = json.dumps(sample_response(**changes)).encode()
    return parse_segment_response(body, prepare_upload(IMAGE), 3)


def test_a_reply_is_parsed_to_arrays_and_values():
    levels = np.arange(24, dtype=np.uint8).reshape(SHAPE) * 11
    response = parse(confidence=png64(levels))
    assert response.label_map.dtype == np.uint8
    assert (response.label_map == LABELS).all()
    assert response.class_names == CLASSES
    assert response.palette.tolist() == sample_response()["palette"]
    assert response.confidence.dtype == np.float32
    assert np.abs(response.confidence * 255.0 - levels).max() < 1e-5
    assert response.entropy is None
    [used] = response.adapters
    assert (used.name, used.version, used.weight, used.distance) == ("rain", 3, 1.0, 0.25)
    assert [skipped.reason for skipped in response.skipped] == ["a stored file is missing"]
    assert (response.generation, response.fallback, response.mode) == (7, None, "fused")
    assert response.timing_ms["total"] == 4.0


def test_a_reply_of_mode_base_has_no_adapters():
    response = parse(mode="base", generation=None, mix=None, adapters=[], skipped=[])
    assert (response.generation, response.mix, response.adapters) == (None, None, ())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"segmentation_mask": None},
            "segmentation_mask: Input should be a valid string, got None",
        ),
        ({"segmentation_mask": "%%"}, "segmentation_mask: "),
        ({"segmentation_mask": png64(LABELS)[:-40]}, "segmentation_mask: "),
        ({"segmentation_mask": png64(LABELS.T.copy())}, "4 x 6"),
        ({"segmentation_mask": png64(np.zeros((9000, 9000), np.uint8))}, "9000 x 9000"),
        ({"segmentation_mask": png64(IMAGE)}, "mode RGB"),
        ({"segmentation_mask": png64(LABELS + 1)}, "id 3 of 3 classes"),
        ({"confidence": png64(LABELS[:2])}, "confidence: "),
        ({"classes": ["road"]}, "classes: got 1, expected 3"),
        ({"classes": ["road", 3, "sky"]}, "classes.1: "),
        ({"palette": [[1, 2, 3]]}, "palette: got 1, expected 3"),
        ({"palette": [[1, 2, 300]] * 3}, "palette.0.2: "),
        ({"palette": [[1, 2], [1], []]}, "palette.0.2: "),
        ({"palette": "red"}, "palette: Input should be a valid array, got 'red'"),
        ({"adapters": {}}, "adapters: Input should be a valid array, got {}"),
        ({"adapters": [3]}, "adapters.0: Input should be an object, got 3"),
        ({"adapters": [{"name": "x"}]}, "adapters.0.version: Field required"),
        ({"generation": "new"}, "generation: Input should be a valid integer, got 'new'"),
        ({"generation": True}, "generation: "),
        ({"tiles": 1.5}, "tiles: "),
        ({"timing_ms": {"total": "slow"}}, "timing_ms.total"),
        ({"timing_ms": {"total": 10**400}}, "timing_ms.total"),
        ({"mode": ["fused"]}, "mode: "),
        ({"request_id": None}, "request_id: "),
    ],
)
def test_replies_that_do_not_fit_the_request_are_rejected(changes, reason):
    with pytest.raises(ServiceError, match="the endpoint's response is invalid") as caught:
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
def test_any_reply_gives_a_response_or_a_service_error(changes):
    with contextlib.suppress(ServiceError):
        response = parse(**changes)
        assert response.label_map.shape == SHAPE
        assert all(math.isfinite(used.weight) for used in response.adapters)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b'{"a": NaN}', b'{"a": -Infinity}', b"\xff\xfe", b"[" * 200_000, b"1" * 9999],
)
def test_what_is_not_json_is_rejected(body):
    with pytest.raises(ServiceError, match="not JSON") as caught:
        parse_object(body)
    assert caught.value.code == "bad_reply"
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_problems_keep_code_and_detail():
    error = problem_error(Problem(422, "cut off", "bad_image", "r9"))
    assert (error.code, str(error)) == ("bad_image", "cut off")
    assert not isinstance(error, RetryableError)
    busy = problem_error(Problem(503, "all busy", "overloaded", "r9"), 3.0)
    assert isinstance(busy, RetryableError)
    assert busy.retry_after_s == 3.0


def test_an_internal_error_names_the_request():
    problem = Problem(500, "A fault.", "internal", "r9")
    assert str(problem_error(problem)) == "A fault. (request r9)"


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "not_found"), (503, "overloaded"), (504, "deadline"), (302, "bad_reply")],
)
def test_responses_of_a_proxy_are_mapped_by_their_status(status, code):
    error = response_error(status, b"<html>nginx</html>", None)
    assert error.code == code
    assert f"HTTP status {status}" in str(error)
    assert isinstance(error, RetryableError) == (status == 503)


def test_text_of_an_endpoint_has_no_control_characters():
    assert printable("\x1b[31mred\r\n\u202e") == "\ufffd[31mred\ufffd\ufffd\ufffd"
    assert len(printable("x" * 10**6)) < 2100
    assert parse(mode="\x1b[31m").mode == "\ufffd[31m"
