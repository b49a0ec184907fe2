"""Both clients against a server that refuses, disconnects, stalls or sends invalid replies."""

import asyncio
import json
import time

import pytest

from loraseg.client import AsyncClient, Client
from loraseg.errors import ConfigError, DatasetError, ServiceError
from tests.unit.client.sample_response import CLASSES, IMAGE, LABELS, sample_response
from tests.unit.client.scripted_server import (
    ScriptedServer,
    answer,
    drop,
    problem,
    raw,
    silence,
    trickle,
)

TOKEN = "s3cr3t-s3cr3t"
GOOD = answer(200, sample_response())
BUSY = problem(503, "overloaded", "all busy", Retry_After="0")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
# Well below the 30 s that the scripted server keeps a silent connection.
SOON_S = 10.0


@pytest.fixture(params=[Client, AsyncClient])
def send(request):
    """Calls a method of either client on a scripted server and returns its result."""

    def run(
        handlers, method="segment", *arguments, token=None, retries=4, timeout_s=20.0, **options
    ):
        arguments = arguments or ((IMAGE, CLASSES) if method == "segment" else ())

        async def run_async(url):
            async with AsyncClient(url, token, retries=retries, timeout_s=timeout_s) as client:
                result = getattr(client, method)(*arguments, **options)
                if method == "segment_batch":
                    return [item async for item in result]
                return await result

        with ScriptedServer(handlers).running() as server:
            run.server = server
            if request.param is AsyncClient:
                return asyncio.run(run_async(server.url))
            with Client(server.url, token, retries=retries, timeout_s=timeout_s) as client:
                result = getattr(client, method)(*arguments, **options)
                return list(result) if method == "segment_batch" else result

    return run


def test_segment_returns_the_label_map(send):
    assert (send([GOOD]).label_map == LABELS).all()


@pytest.mark.parametrize(
    "failure",
    [
        BUSY,
        problem(503, "not_ready", Retry_After="0"),
        problem(429, "too_many_requests", Retry_After="0"),
        answer(503, b"<html>upstream</html>"),
        drop,
        raw(b"\x16\x03\x01 this is not HTTP\r\n\r\n"),
        raw(HEAD + b"Content-Length: 1000\r\n\r\n" + b"{"),
        raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc"),
    ],
)
def test_temporary_failures_are_retried(send, failure):
    assert (send([failure, failure, GOOD]).label_map == LABELS).all()
    bodies = [request.body.split(b"\r\n\r\n")[-1] for request in send.server.requests]
    assert len(bodies) == 3
    assert all(b"PNG" in request.body for request in send.server.requests)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (problem(400, "bad_request"), "bad_request"),
        (problem(401, "unauthorized"), "unauthorized"),
        (problem(404, "no_such_library"), "no_such_library"),
        (problem(422, "bad_image"), "bad_image"),
        (problem(500, "internal"), "internal"),
        (problem(504, "deadline"), "deadline"),
        (answer(302, b"", Location="http://elsewhere.example.org/"), "bad_reply"),
        (answer(200, b"<html>hello</html>"), "bad_reply"),
        (answer(200, {"hello": "world"}), "bad_reply"),
        (answer(200, b"\x1f\x8b\x08", Content_Encoding="gzip"), "bad_reply"),
        (answer(204, b""), "bad_reply"),
    ],
)
def test_permanent_failures_are_raised_at_once(send, failure, code):
    with pytest.raises(ServiceError, match=r"no reason|HTTP status|is invalid") as caught:
        send([failure, GOOD])
    assert caught.value.code == code
    assert len(send.server.requests) == 1


def test_the_last_error_is_raised_after_the_last_retry(send):
    with pytest.raises(ServiceError, match="all busy") as caught:
        send([BUSY], retries=2)
    assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 0.0)
    assert len(send.server.requests) == 3


def test_retry_after_is_honoured(send):
    send([problem(503, "overloaded", Retry_After="1"), GOOD])
    first, second = (request.received_at for request in send.server.requests)
    assert second - first >= 1.0


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(send):
    started = time.monotonic()
    with pytest.raises(ServiceError, match="come later") as caught:
        send([problem(503, "draining", "come later", Retry_After="3000")])
    assert caught.value.retry_after_s == 3000.0
    assert time.monotonic() - started < SOON_S
    assert len(send.server.requests) == 1


@pytest.mark.parametrize(
    "handler",
    [
        silence,
        trickle(b"", b"HTTP/1.1 200 OK\r\nX: "[:1]),
        trickle(HEAD, b"X-Padding: x\r\n"),
        trickle(HEAD + b"Content-Length: 100000000\r\n\r\n", b" "),
        trickle(HEAD + b"\r\n", b" "),
        trickle(b"HTTP/1.1 503 X\r\n\r\n", b" "),
    ],
)
def test_the_deadline_holds_while_bytes_keep_arriving(send, handler):
    started = time.monotonic()
    with pytest.raises(ServiceError, match=r"no response in|HTTP") as caught:
        send([handler], timeout_s=0.5, retries=0)
    assert caught.value.code in ("deadline", "unreachable")
    assert time.monotonic() - started < SOON_S


def test_the_deadline_covers_all_attempts(send):
    started = time.monotonic()
    with pytest.raises(ServiceError, match="all busy"):
        send([BUSY], timeout_s=0.5, retries=10**6)
    assert time.monotonic() - started < SOON_S


@pytest.mark.parametrize(
    "head",
    [HEAD + b"Content-Length: 99999999999\r\n\r\n", HEAD + b"\r\n", b"HTTP/1.1 500 X\r\n\r\n"],
)
def test_endless_bodies_are_not_read_to_the_end(send, head):
    with pytest.raises(ServiceError, match=r"over \d+ bytes") as caught:
        send([trickle(head, b"x" * 2**20, pause_s=0.0)])
    assert caught.value.code == "bad_reply"


def test_endless_headers_are_not_read_to_the_end(send):
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1") as caught:
        send([trickle(HEAD, b"X-Padding: " + b"x" * 1000 + b"\r\n", pause_s=0.0)], retries=0)
    assert caught.value.code == "unreachable"


def test_no_server_at_the_address(send):
    with (
        pytest.raises(ServiceError, match=r"127\.0\.0\.1:1") as caught,
        Client("http://127.0.0.1:1", retries=1) as client,
    ):
        client.base()
    assert caught.value.code == "unreachable"


def test_the_request_has_token_and_form_fields(send):
    send(
        [GOOD],
        *("segment", IMAGE, CLASSES),
        token=TOKEN,
        library="main",
        top_k=3,
        temperature=0.25,
        adapters=["rain", "-snow"],
        mode="uniform",
        maps={"entropy", "confidence"},
        tiling="never",
        timeout_s=7.0,
    )
    [request] = send.server.requests
    assert request.line == "POST /v1/segment HTTP/1.1"
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.headers["accept-encoding"] == "identity"
    form = _form(request)
    assert 6.0 < float(form.pop("timeout_s")) <= 7.0
    assert form == {
        "classes": '["road", "car", "sky"]',
        "return": "mask,confidence,entropy,explanation",
        "library": "main",
        "top_k": "3",
        "temperature": "0.25",
        "adapters": "rain,-snow",
        "mode": "uniform",
        "tiling": "never",
    }


def test_unset_options_are_not_sent(send):
    send([GOOD], library=None, top_k=None, adapters=())
    assert set(_form(send.server.requests[0])) == {"classes", "return", "timeout_s"}


def test_neither_token_nor_cookies_leak(send, caplog):
    caplog.set_level("DEBUG")
    send([problem(503, "overloaded", Retry_After="0", Set_Cookie="a=b"), GOOD], token=TOKEN)
    assert "cookie" not in send.server.requests[1].headers
    with Client("http://127.0.0.1:1", TOKEN, retries=0) as client:
        assert repr(client) == "Client('http://127.0.0.1:1')"
        with pytest.raises(ServiceError, match=r"127\.0\.0\.1:1") as caught:
            client.base()
    assert TOKEN not in caplog.text + repr(caught.value) + str(caught.value)


def test_plain_http_ignores_proxies_of_the_environment(send, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert (send([GOOD], token=TOKEN).label_map == LABELS).all()


def test_invalid_arguments():
    for arguments in ({"timeout_s": 0.0}, {"timeout_s": float("inf")}, {"retries": -1}):
        with pytest.raises(ConfigError, match="expected above 0, and 0 or more"):
            Client("http://127.0.0.1:1", **arguments)
    with pytest.raises(ConfigError, match="unencrypted"):
        Client("http://example.org", TOKEN)


def test_a_closed_client_raises():
    client = Client("http://127.0.0.1:1")
    client.close()
    client.close()
    with pytest.raises(ServiceError, match="has been closed"):
        client.base()


# --- batches ---


def line(index, **changes):
    return (
        json.dumps({"index": index, "file": str(index), **sample_response(**changes)}).encode()
        + b"\n"
    )


def bad(index, status, code):
    error = {"status": status, "code": code, "detail": code, "request_id": "r1"}
    return json.dumps({"index": index, "file": "", "error": error}).encode() + b"\n"


def done(count):
    return json.dumps({"done": count, "failed": 0}).encode() + b"\n"


def stream(*lines, cut=False):
    return raw(HEAD + b"Connection: close\r\n\r\n" + b"".join(lines) + (b'{"ind' if cut else b""))


def test_batch_results_come_in_the_order_of_completion(send):
    lines = (line(2), bad(0, 422, "bad_image"), line(1), done(3))
    results = send([stream(*lines)], "segment_batch", [IMAGE] * 3, CLASSES)
    assert [index for index, _ in results] == [2, 0, 1]
    assert results[1][1].code == "bad_image"
    assert (results[0][1].label_map == LABELS).all()


def test_only_images_without_a_result_are_sent_again(send):
    first = stream(line(0), bad(2, 503, "replica_lost"), line(3), bad(1, 504, "deadline"), done(4))
    second = stream(line(1), cut=True)  # the request has images 1 and 2; its index 1 is image 2
    results = send(
        [first, second, BUSY, stream(line(0), done(1))], "segment_batch", [IMAGE] * 4, CLASSES
    )
    assert [index for index, _ in results] == [0, 3, 2, 1]
    assert [request.body.count(b"PNG\r\n") for request in send.server.requests] == [4, 2, 1, 1]


def test_images_that_keep_failing_get_their_last_error(send):
    first = stream(bad(0, 503, "adapters_unavailable"), line(1), done(2))
    second = stream(bad(0, 503, "adapters_unavailable"), done(1))
    results = send([first, second], "segment_batch", [IMAGE] * 2, CLASSES, retries=2)
    assert [index for index, _ in results] == [1, 0]
    assert results[1][1].code == "adapters_unavailable"
    assert len(send.server.requests) == 3


def test_an_error_of_the_whole_request_ends_a_batch(send):
    with pytest.raises(ServiceError, match="no reason") as caught:
        send([problem(401, "unauthorized")], "segment_batch", [IMAGE], CLASSES)
    assert caught.value.code == "unauthorized"


@pytest.mark.parametrize(
    "lines",
    [
        (line(0), line(0), done(1)),
        (line(1), done(1)),
        (line(-1), done(1)),
        (done(1),),
        (b"[]\n",),
        (b"<html>\n",),
        (b'{"index": "0"}\n',),
        (b'{"index": 0, "error": "x"}\n',),
        (line(0, classes=["x"]), done(1)),
        (b"x" * 2**26,),
    ],
)
def test_lines_that_do_not_match_the_request_are_rejected(send, lines):
    with pytest.raises(ServiceError, match="is invalid") as caught:
        send([stream(*lines)], "segment_batch", [IMAGE, IMAGE][: len(lines)], CLASSES)
    assert caught.value.code == "bad_reply"


def test_a_batch_response_that_stalls(send):
    head = HEAD + b"\r\n" + line(0)
    with pytest.raises(ServiceError, match="no response in") as caught:
        send([trickle(head, b" ")], "segment_batch", [IMAGE] * 2, CLASSES, timeout_s=0.5)
    assert caught.value.code == "deadline"


def test_many_images_are_split_into_requests_and_read_lazily(send):
    def images():
        for index in range(20):
            yield b"no image" if index == 3 else IMAGE

    handlers = [stream(*map(line, range(15)), done(15)), stream(*map(line, range(4)), done(4))]
    results = dict(send(handlers, "segment_batch", images(), CLASSES))
    assert sorted(results) == list(range(20))
    assert isinstance(results[3], DatasetError)
    assert len(send.server.requests) == 2


def test_closing_a_batch_early_closes_its_connection():
    script = [trickle(HEAD + b"\r\n" + line(0), b" ")]
    with ScriptedServer(script).running() as server, Client(server.url) as client:
        results = client.segment_batch([IMAGE] * 2, CLASSES)
        assert next(results)[0] == 0
        results.close()


def test_no_images_send_no_request(send):
    assert send([GOOD], "segment_batch", [], CLASSES) == []
    assert send.server.requests == []


def test_is_ready(send):
    assert send([answer(200, {})], "is_ready") is True
    assert send([problem(503, "not_ready"), answer(200, {})], "is_ready") is False
    assert send([drop], "is_ready") is False


def _form(request):
    boundary = request.headers["content-type"].partition("boundary=")[2].encode()
    fields = {}
    for part in request.body.split(b"--" + boundary)[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        if b"filename" not in head:
            fields[head.partition(b'name="')[2].partition(b'"')[0].decode()] = value[:-2].decode()
    return fields
