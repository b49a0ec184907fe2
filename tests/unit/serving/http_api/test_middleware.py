"""What only shows on a real connection: slow, endless, refused and abandoned requests."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

from loraseg.serving.engine import Readiness
from loraseg.serving.http_api.app import build_api
from tests.asgi_server import serve_on_free_port
from tests.unit.serving.api_client import NIGHT, ApiClient, png
from tests.unit.serving.http_api.test_forms import form


class BlockingEngine:
    """An engine that is never done; remembers what became of its orders."""

    def __init__(self):
        self.started, self.cancelled = threading.Semaphore(0), threading.Semaphore(0)

    async def segment(self, request):
        self.started.release()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled.release()
            raise

    async def readiness(self):
        return Readiness(False, ("library 'main': being loaded",))

    async def catalog(self, library):
        raise RuntimeError("secret of /etc/service")

    async def card(self, library, name):
        raise NotImplementedError

    async def refresh(self, library):
        raise NotImplementedError

    async def base(self):
        raise NotImplementedError


def connect(port, *parts):
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    for part in parts:
        connection.sendall(part)
    return connection


def answer(connection):
    """Read until the server closes; return status and body."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def head(length, kind="image/png", path="/v1/segment?classes=road"):
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}", "Connection: close"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def code(connection):
    status, body = answer(connection)
    return status, json.loads(body)["code"]


@pytest.fixture
def small(engine, world):
    talk = ApiClient(engine, world, limits={"body_bytes": 100_000, "body_timeout_s": 0.5})
    with serve_on_free_port(talk.api) as port:
        yield port


def test_slow_body_is_given_up(small):
    with connect(small, head(1000), b"x" * 10) as connection:
        assert code(connection) == (408, "body_timeout")


def test_trickling_body_is_given_up_in_the_same_time(small):
    with connect(small, head(1000)) as connection:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 2:
                connection.sendall(b"x")
                time.sleep(0.1)
                connection.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(12) == b"HTTP/1.1 408"
                    break
        assert time.monotonic() - started < 1.9


def test_announced_length_is_refused_before_the_body_is_read(small):
    with connect(small, head(10**12)) as connection:
        assert code(connection) == (413, "body_too_large")


def test_client_that_sends_it_all_the_same_hears_the_reason(small):
    with connect(small, head(3_000_000), b"x" * 3_000_000) as connection:
        assert code(connection) == (413, "body_too_large")


def test_endless_chunks_are_refused_at_the_limit(small):
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunks = b"".join(b"4000\r\n" + b"x" * 0x4000 + b"\r\n" for _ in range(8))
    with connect(small, start, chunks) as connection:
        assert code(connection) == (413, "body_too_large")


def test_refusal_does_not_wait_for_the_body(small):
    with connect(small, head(50_000, kind="text/plain")) as connection:
        started = time.monotonic()
        connection.settimeout(5)
        assert connection.recv(12) == b"HTTP/1.1 415"
        assert time.monotonic() - started < 0.45


@pytest.mark.parametrize("path", ["/v1/segment", "/v1/segment/batch"])
def test_work_is_cancelled_when_the_client_leaves(world, path):
    engine = BlockingEngine()
    talk = ApiClient(engine, world, limits={"concurrent": 1})
    field = "images" if path.endswith("batch") else "image"
    body = form([("classes", None, b"road"), (field, "a", png(NIGHT))])
    kind = "multipart/form-data; boundary=----b0undary"
    with serve_on_free_port(talk.api) as port:
        with connect(port, head(len(body), kind, path), body):
            assert engine.started.acquire(timeout=10)
        assert engine.cancelled.acquire(timeout=10)
        # The place is free again, a moment later.
        deadline = time.monotonic() + 10
        is_begun = False
        while not is_begun and time.monotonic() < deadline:
            with connect(port, head(len(body), kind, path), body):
                is_begun = engine.started.acquire(timeout=0.5)
        assert is_begun
    # Those who came before the place was free were sent away, maybe earlier than the first ended.
    served = [visit.status for visit in talk.contexts if visit.status != 429]
    assert served[0] in (499, 200)


def test_places_are_bounded(world):
    engine = BlockingEngine()
    api = ApiClient(engine, world, limits={"concurrent": 1}).api
    body = png(NIGHT)
    with serve_on_free_port(api) as port, connect(port, head(len(body)), body):
        assert engine.started.acquire(timeout=10)
        with connect(port, head(len(body)), body) as second:
            assert code(second) == (429, "too_many_requests")


def test_not_ready_says_what_is_missing(world):
    told = ApiClient(BlockingEngine(), world)("GET", "/readyz")
    assert told.status_code == 503
    assert told.headers["retry-after"] == "1"
    assert told.json()["waiting_for"] == ["library 'main': being loaded"]
    assert told.json()["ready"] is False


def test_fault_is_logged_and_not_told(world, caplog):
    talk = ApiClient(BlockingEngine(), world)
    with pytest.raises(AssertionError):
        talk("GET", "/v1/adapters")
    assert "secret of /etc/service" in caplog.text
    with serve_on_free_port(build_api(BlockingEngine(), world)) as port:
        request = b"GET /v1/adapters HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with connect(port, request) as connection:
            status, body = answer(connection)
    assert status == 500
    assert b"secret" not in body


def test_each_request_is_reported_once_with_route_and_bytes(talk):
    talk.segment(headers={"X-Request-ID": "seen"})
    talk("GET", "/v1/adapters/fog")
    talk("GET", "/nothing/here")
    first, second, third = talk.contexts
    assert (first.request_id, first.route, first.status) == ("seen", "/v1/segment", 200)
    assert first.bytes_in > 100
    assert first.bytes_out > 500
    assert first.duration_s > 0
    assert second.route == "/v1/adapters/{name}"
    assert (third.route, third.status, third.code) == ("-", 404, "not_found")
