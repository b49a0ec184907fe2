"""Slow, endless, rejected and abandoned requests, on real connections."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest

from loraseg.api_types import ReadinessInfo
from loraseg.serving.engine import Engine
from loraseg.serving.http_api.app import build_api
from tests.asgi_server import serve_on_free_port
from tests.unit.serving.api_client import NIGHT, ApiClient, png
from tests.unit.serving.http_api.test_forms import form


class BlockingEngine(Engine):
    """An engine that does not finish within a test; counts started and cancelled requests."""

    def __init__(self, config):
        super().__init__(config, max_in_flight=8)
        self.started, self.cancelled = threading.Semaphore(0), threading.Semaphore(0)

    async def _retrieve(self, request):
        self.started.release()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled.release()
            raise

    async def _segment(self, request):
        raise NotImplementedError

    async def readiness(self):
        return ReadinessInfo(False, ("library 'main': being loaded",))

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


def read_response(connection):
    """Read until the server closes the connection; return status and body."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def head(length, kind="image/png", path="/v1/segment?classes=road"):
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}", "Connection: close"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def status_and_code(connection):
    status, body = read_response(connection)
    return status, json.loads(body)["code"]


@pytest.fixture
def small(engine, config):
    api = ApiClient(engine, config, limits={"body_bytes": 100_000, "body_timeout_s": 0.5})
    with serve_on_free_port(api.api) as port:
        yield port


def test_slow_bodies_time_out(small):
    with connect(small, head(1000), b"x" * 10) as connection:
        assert status_and_code(connection) == (408, "body_timeout")


def test_trickling_bodies_time_out_as_soon(small):
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


def test_content_length_above_the_limit_is_rejected_before_the_body(small):
    with connect(small, head(10**12)) as connection:
        assert status_and_code(connection) == (413, "body_too_large")


def test_clients_that_send_a_rejected_body_receive_the_response(small):
    with connect(small, head(3_000_000), b"x" * 3_000_000) as connection:
        assert status_and_code(connection) == (413, "body_too_large")


def test_endless_chunks_are_rejected_at_the_limit(small):
    start = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunks = b"".join(b"4000\r\n" + b"x" * 0x4000 + b"\r\n" for _ in range(8))
    with connect(small, start, chunks) as connection:
        assert status_and_code(connection) == (413, "body_too_large")


def test_an_error_response_does_not_wait_for_the_body(small):
    with connect(small, head(50_000, kind="text/plain")) as connection:
        started = time.monotonic()
        connection.settimeout(5)
        assert connection.recv(12) == b"HTTP/1.1 415"
        assert time.monotonic() - started < 0.45


@pytest.mark.parametrize("path", ["/v1/segment", "/v1/segment/batch"])
def test_work_is_cancelled_when_the_client_disconnects(config, path):
    engine = BlockingEngine(config)
    api = ApiClient(engine, config, limits={"concurrent": 1})
    field = "images" if path.endswith("batch") else "image"
    body = form([("classes", None, b"road"), (field, "a", png(NIGHT))])
    kind = "multipart/form-data; boundary=----b0undary"
    with serve_on_free_port(api.api) as port:
        with connect(port, head(len(body), kind, path), body):
            assert engine.started.acquire(timeout=10)
        assert engine.cancelled.acquire(timeout=10)
        # The slot is released shortly afterwards.
        deadline = time.monotonic() + 10
        is_started = False
        while not is_started and time.monotonic() < deadline:
            with connect(port, head(len(body), kind, path), body):
                is_started = engine.started.acquire(timeout=0.5)
        assert is_started
    # Requests before the release of the slot got 429, maybe before the first one ended.
    served = [context.status for context in api.contexts if context.status != 429]
    assert served[0] in (499, 200)


def test_concurrent_requests_are_limited(config):
    engine = BlockingEngine(config)
    api = ApiClient(engine, config, limits={"concurrent": 1}).api
    body = png(NIGHT)
    with serve_on_free_port(api) as port, connect(port, head(len(body)), body):
        assert engine.started.acquire(timeout=10)
        with connect(port, head(len(body)), body) as second:
            assert status_and_code(second) == (429, "too_many_requests")


def test_not_ready_lists_what_is_missing(config):
    response = ApiClient(BlockingEngine(config), config)("GET", "/readyz")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["waiting_for"] == ["library 'main': being loaded"]
    assert response.json()["ready"] is False


def test_internal_errors_are_logged_and_not_revealed(config, caplog):
    api = ApiClient(BlockingEngine(config), config)
    with pytest.raises(AssertionError):
        api("GET", "/v1/adapters")
    assert "secret of /etc/service" in caplog.text
    with serve_on_free_port(build_api(BlockingEngine(config), config)) as port:
        request = b"GET /v1/adapters HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with connect(port, request) as connection:
            status, body = read_response(connection)
    assert status == 500
    assert b"secret" not in body


def test_each_request_is_reported_once_with_route_and_sizes(api):
    api.segment(headers={"X-Request-ID": "seen"})
    api("GET", "/v1/adapters/fog")
    api("GET", "/nothing/here")
    first, second, third = api.contexts
    assert (first.request_id, first.route, first.status) == ("seen", "/v1/segment", 200)
    assert first.bytes_in > 100
    assert first.bytes_out > 500
    assert first.duration_s > 0
    assert second.route == "/v1/adapters/{name}"
    assert (third.route, third.status, third.problem_code) == ("-", 404, "not_found")
