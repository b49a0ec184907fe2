"""How the clients meet servers that refuse, break off, dawdle or lie; the requests are real."""

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
# Long before the thirty seconds that a silent server keeps a connection.
SOON_S = 10.0


@pytest.fixture(params=[Client, AsyncClient])
def ask(request):
    """Call a method of either client on the server of a script; return its result."""

    def run(acts, method="segment", *arguments, token=None, retries=4, timeout_s=20.0, **options):
        arguments = arguments or ((IMAGE, CLASSES) if method == "segment" else ())

        async def run_async(url):
            async with AsyncClient(url, token, retries=retries, timeout_s=timeout_s) as client:
                asked = getattr(client, method)(*arguments, **options)
                if method == "segment_batch":
                    return [settled async for settled in asked]
                return await asked

        with ScriptedServer(acts).running() as server:
            run.server = server
            if request.param is AsyncClient:
                return asyncio.run(run_async(server.url))
            with Client(server.url, token, retries=retries, timeout_s=timeout_s) as client:
                result = getattr(client, method)(*arguments, **options)
                return list(result) if method == "segment_batch" else result

    return run


def test_a_reply(ask):
    assert (ask([GOOD]).label_map == LABELS).all()


@pytest.mark.parametrize(
    "failure",
    [
        BUSY,
        problem(503, "not_ready", Retry_After="0"),
        problem(429, "too_many_requests", Retry_After="0"),
        answer(503, b"<html>upstream</html>"),
        drop,
        raw(b"\x16\x03\x01 this is no HTTP\r\n\r\n"),
        raw(HEAD + b"Content-Length: 1000\r\n\r\n" + b"{"),
        raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc"),
    ],
)
def test_what_passes_by_itself_is_tried_again(ask, failure):
    assert (ask([failure, failure, GOOD]).label_map == LABELS).all()
    bodies = [seen.body.split(b"\r\n\r\n")[-1] for seen in ask.server.seen]
    assert len(bodies) == 3
    assert all(b"PNG" in seen.body for seen in ask.server.seen)


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
def test_what_does_not_pass_is_told_at_once(ask, failure, code):
    with pytest.raises(ServiceError, match=r"no reason|HTTP status|cannot be used") as caught:
        ask([failure, GOOD])
    assert caught.value.code == code
    assert len(ask.server.seen) == 1


def test_the_last_refusal_is_told_when_retries_are_over(ask):
    with pytest.raises(ServiceError, match="all busy") as caught:
        ask([BUSY], retries=2)
    assert (caught.value.code, caught.value.retry_after_s) == ("overloaded", 0.0)
    assert len(ask.server.seen) == 3


def test_retry_after_is_honoured(ask):
    ask([problem(503, "overloaded", Retry_After="1"), GOOD])
    first, second = (seen.at for seen in ask.server.seen)
    assert second - first >= 1.0


def test_a_retry_after_beyond_the_time_is_not_waited_out(ask):
    started = time.monotonic()
    with pytest.raises(ServiceError, match="come later") as caught:
        ask([problem(503, "draining", "come later", Retry_After="3000")])
    assert caught.value.retry_after_s == 3000.0
    assert time.monotonic() - started < SOON_S
    assert len(ask.server.seen) == 1


@pytest.mark.parametrize(
    "act",
    [
        silence,
        trickle(b"", b"HTTP/1.1 200 OK\r\nX: "[:1]),
        trickle(HEAD, b"X-Padding: x\r\n"),
        trickle(HEAD + b"Content-Length: 100000000\r\n\r\n", b" "),
        trickle(HEAD + b"\r\n", b" "),
        trickle(b"HTTP/1.1 503 X\r\n\r\n", b" "),
    ],
)
def test_time_ends_however_slowly_bytes_keep_coming(ask, act):
    started = time.monotonic()
    with pytest.raises(ServiceError, match=r"no answer in|HTTP") as caught:
        ask([act], timeout_s=0.5, retries=0)
    assert caught.value.code in ("deadline", "unreachable")
    assert time.monotonic() - started < SOON_S


def test_the_time_holds_for_all_attempts_together(ask):
    started = time.monotonic()
    with pytest.raises(ServiceError, match="all busy"):
        ask([BUSY], timeout_s=0.5, retries=10**6)
    assert time.monotonic() - started < SOON_S


@pytest.mark.parametrize(
    "head",
    [HEAD + b"Content-Length: 99999999999\r\n\r\n", HEAD + b"\r\n", b"HTTP/1.1 500 X\r\n\r\n"],
)
def test_endless_answers_are_not_read_to_the_end(ask, head):
    with pytest.raises(ServiceError, match=r"over \d+ bytes") as caught:
        ask([trickle(head, b"x" * 2**20, pause_s=0.0)])
    assert caught.value.code == "bad_reply"


def test_endless_headers_are_not_read_to_the_end(ask):
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1") as caught:
        ask([trickle(HEAD, b"X-Padding: " + b"x" * 1000 + b"\r\n", pause_s=0.0)], retries=0)
    assert caught.value.code == "unreachable"


def test_nobody_there(ask):
    with (
        pytest.raises(ServiceError, match=r"127\.0\.0\.1:1") as caught,
        Client("http://127.0.0.1:1", retries=1) as client,
    ):
        client.base()
    assert caught.value.code == "unreachable"


def test_what_is_asked(ask):
    ask(
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
    [seen] = ask.server.seen
    assert seen.line == "POST /v1/segment HTTP/1.1"
    assert seen.headers["authorization"] == f"Bearer {TOKEN}"
    assert seen.headers["accept-encoding"] == "identity"
    form = _form(seen)
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


def test_what_is_left_out_is_not_sent(ask):
    ask([GOOD], library=None, top_k=None, adapters=())
    assert set(_form(ask.server.seen[0])) == {"classes", "return", "timeout_s"}


def test_neither_token_nor_cookies_wander(ask, caplog):
    caplog.set_level("DEBUG")
    ask([problem(503, "overloaded", Retry_After="0", Set_Cookie="a=b"), GOOD], token=TOKEN)
    assert "cookie" not in ask.server.seen[1].headers
    with Client("http://127.0.0.1:1", TOKEN, retries=0) as client:
        assert repr(client) == "Client('http://127.0.0.1:1')"
        with pytest.raises(ServiceError, match=r"127\.0\.0\.1:1") as caught:
            client.base()
    assert TOKEN not in caplog.text + repr(caught.value) + str(caught.value)


def test_plain_http_does_not_go_through_a_proxy_of_the_environment(ask, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert (ask([GOOD], token=TOKEN).label_map == LABELS).all()


def test_unfit_arguments():
    for arguments in ({"timeout_s": 0.0}, {"timeout_s": float("inf")}, {"retries": -1}):
        with pytest.raises(ConfigError, match="expected above 0, and 0 or more"):
            Client("http://127.0.0.1:1", **arguments)
    with pytest.raises(ConfigError, match="unencrypted"):
        Client("http://example.org", TOKEN)


def test_a_closed_client_says_so():
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


def test_a_batch_settles_in_the_order_of_finishing(ask):
    lines = (line(2), bad(0, 422, "bad_image"), line(1), done(3))
    found = ask([stream(*lines)], "segment_batch", [IMAGE] * 3, CLASSES)
    assert [index for index, _ in found] == [2, 0, 1]
    assert found[1][1].code == "bad_image"
    assert (found[0][1].label_map == LABELS).all()


def test_only_what_is_not_settled_is_asked_for_again(ask):
    first = stream(line(0), bad(2, 503, "replica_lost"), line(3), bad(1, 504, "deadline"), done(4))
    second = stream(line(1), cut=True)  # of two images, 1 and 2: this is 2
    found = ask(
        [first, second, BUSY, stream(line(0), done(1))], "segment_batch", [IMAGE] * 4, CLASSES
    )
    assert [index for index, _ in found] == [0, 3, 2, 1]
    assert [seen.body.count(b"PNG\r\n") for seen in ask.server.seen] == [4, 2, 1, 1]


def test_images_that_stay_refused_get_their_refusal(ask):
    refused = stream(bad(0, 503, "adapters_unavailable"), line(1), done(2))
    still = stream(bad(0, 503, "adapters_unavailable"), done(1))
    found = ask([refused, still], "segment_batch", [IMAGE] * 2, CLASSES, retries=2)
    assert [index for index, _ in found] == [1, 0]
    assert found[1][1].code == "adapters_unavailable"
    assert len(ask.server.seen) == 3


def test_a_refusal_of_the_whole_request_ends_a_batch(ask):
    with pytest.raises(ServiceError, match="no reason") as caught:
        ask([problem(401, "unauthorized")], "segment_batch", [IMAGE], CLASSES)
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
def test_lines_that_do_not_belong_to_the_question(ask, lines):
    with pytest.raises(ServiceError, match="cannot be used") as caught:
        ask([stream(*lines)], "segment_batch", [IMAGE, IMAGE][: len(lines)], CLASSES)
    assert caught.value.code == "bad_reply"


def test_a_batch_that_stops_coming(ask):
    head = HEAD + b"\r\n" + line(0)
    with pytest.raises(ServiceError, match="no answer in") as caught:
        ask([trickle(head, b" ")], "segment_batch", [IMAGE] * 2, CLASSES, timeout_s=0.5)
    assert caught.value.code == "deadline"


def test_many_images_go_in_several_requests_and_are_read_as_needed(ask):
    read = []

    def images():
        for index in range(20):
            read.append(index)
            yield b"no image" if index == 3 else IMAGE

    acts = [stream(*map(line, range(15)), done(15)), stream(*map(line, range(4)), done(4))]
    found = dict(ask(acts, "segment_batch", images(), CLASSES))
    assert sorted(found) == list(range(20))
    assert isinstance(found[3], DatasetError)
    assert len(ask.server.seen) == 2


def test_a_batch_that_is_left_half_way_closes_its_connection():
    script = [trickle(HEAD + b"\r\n" + line(0), b" ")]
    with ScriptedServer(script).running() as server, Client(server.url) as client:
        found = client.segment_batch([IMAGE] * 2, CLASSES)
        assert next(found)[0] == 0
        found.close()


def test_no_images_no_request(ask):
    assert ask([GOOD], "segment_batch", [], CLASSES) == []
    assert ask.server.seen == []


def test_readiness(ask):
    assert ask([answer(200, {})], "is_ready") is True
    assert ask([problem(503, "not_ready"), answer(200, {})], "is_ready") is False
    assert ask([drop], "is_ready") is False


def _form(seen):
    boundary = seen.headers["content-type"].partition("boundary=")[2].encode()
    fields = {}
    for part in seen.body.split(b"--" + boundary)[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        if b"filename" not in head:
            fields[head.partition(b'name="')[2].partition(b'"')[0].decode()] = value[:-2].decode()
    return fields
