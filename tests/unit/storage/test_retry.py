"""Trying again: what for, how long, with which pauses."""

import types

import botocore.exceptions
import botocore.parsers
import pytest
import urllib3.exceptions

from loraseg.storage import backoff_s, retry


class Clock:
    """Time that passes only in pauses and requests."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    fake = types.SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep)
    monkeypatch.setattr(retry, "time", fake)
    return clock


def client_error(status, code=""):
    return botocore.exceptions.ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


TRANSIENT = [
    *(client_error(status) for status in (409, 429, 500, 502, 503, 504)),
    *(client_error(400, code) for code in ("RequestTimeout", "BadDigest", "IncompleteBody")),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
    botocore.exceptions.ConnectTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://x"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.ResponseStreamingError(error="cut"),
    botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    botocore.parsers.ResponseParserError("cut"),
    urllib3.exceptions.ProtocolError("cut"),
    ConnectionResetError(),
]
PERMANENT = [
    *(client_error(status) for status in (400, 403, 404, 412, 501)),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.SSLError(endpoint_url="https://x", error="certificate"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_pass_is_tried_again(clock, error):
    outcomes = [error, error, None]

    def request():
        outcome = outcomes.pop(0)
        if outcome:
            raise outcome
        return "done"

    assert retry.retry_call(request, 100.0, "test") == "done"


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_what_lasts_is_not(clock, error):
    calls = []

    def request():
        calls.append(clock.now)
        raise error

    with pytest.raises(type(error)):
        retry.retry_call(request, 100.0, "test")
    assert calls == [0.0]


@pytest.mark.parametrize("request_s", [0.0, 0.5, 30.0])
def test_patience_ends_in_time(clock, request_s, caplog):
    def request():
        clock.now += request_s
        raise client_error(503, "SlowDown")

    with pytest.raises(botocore.exceptions.ClientError):
        retry.retry_call(request, 120.0, "s3://bucket: write 'key'")
    assert 110.0 < clock.now <= 120.0 + request_s
    (line,) = caplog.messages
    assert line.startswith("s3://bucket: write 'key': failed (SlowDown)")


def test_pauses_grow_to_a_bound_and_differ():
    for attempt in range(20):
        bound = min(5.0, 0.1 * 2**attempt)
        pauses = [backoff_s(attempt, 0.1, 5.0) for _ in range(50)]
        assert all(0.0 <= pause < bound for pause in pauses)
        assert len(set(pauses)) > 40
