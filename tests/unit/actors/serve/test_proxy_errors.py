"""The middleware of the proxies and of draining gateways; a gateway is a small ASGI app."""

import asyncio
import json

import pytest

from actors.serve.drain import DrainMiddleware, DrainState
from actors.serve.proxy_errors import ProxyErrorMiddleware, middlewares


def get(app, path="/v1/base", headers=()):
    """Return status, headers and body of an ASGI app's response."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": list(headers)}
    asyncio.run(app(scope, receive, send))
    start, *body = sent
    return (
        start["status"],
        {key.decode().lower(): value.decode() for key, value in start["headers"]},
        b"".join(message["body"] for message in body),
    )


def responding(status, media_type, content=b"text"):
    async def app(scope, receive, send):
        headers = [(b"content-type", media_type)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app


async def silent(scope, receive, send):
    """Sends nothing, as the proxy after the death of the gateway."""


def test_middlewares_returns_the_middleware():
    [middleware] = middlewares()
    assert middleware.cls is ProxyErrorMiddleware


def test_a_request_without_a_response_gets_replica_lost():
    status, headers, body = get(ProxyErrorMiddleware(silent), headers=[(b"x-request-id", b"mine")])
    problem = json.loads(body)
    assert (status, problem["code"], problem["request_id"]) == (503, "replica_lost", "mine")
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == "mine"
    assert int(headers["retry-after"]) >= 1


@pytest.mark.parametrize(("status", "code"), [(503, "overloaded"), (500, "replica_lost")])
def test_errors_of_serve_are_replaced_by_problem_details(status, code):
    received, headers, body = get(
        ProxyErrorMiddleware(responding(status, b"text/plain; charset=utf-8"))
    )
    assert (received, json.loads(body)["code"]) == (503, code)
    assert b"text" not in body
    assert "retry-after" in headers


@pytest.mark.parametrize("status", [200, 404, 500, 503])
def test_responses_of_the_api_are_unchanged(status):
    received, _, body = get(ProxyErrorMiddleware(responding(status, b"application/problem+json")))
    assert (received, body) == (status, b"text")


def test_paths_of_serve_are_unchanged():
    received, _, body = get(ProxyErrorMiddleware(responding(503, b"text/plain")), path="/-/healthz")
    assert (received, body) == (503, b"text")


@pytest.mark.parametrize("given", [b"a b", b"<script>", b"x" * 65, b""])
def test_an_invalid_request_id_is_replaced(given):
    ids = []

    async def app(scope, receive, send):
        ids.extend(value for key, value in scope["headers"] if key == b"x-request-id")

    get(ProxyErrorMiddleware(app), headers=[(b"X-Request-ID", given)])
    [request_id] = ids
    assert request_id != given
    assert request_id.isalnum()


def test_a_draining_gateway_rejects_new_requests_and_counts_running_ones():
    async def scenario():
        finish = asyncio.Event()

        async def app(scope, receive, send):
            await finish.wait()

        state = DrainState()
        middleware = DrainMiddleware(app, state)
        running = asyncio.create_task(middleware({"type": "http", "headers": []}, None, None))
        await asyncio.sleep(0)
        state.is_draining = True
        assert state.in_flight == 1
        finish.set()
        await running
        assert state.in_flight == 0
        return middleware

    status, headers, body = get(asyncio.run(scenario()))
    assert (status, json.loads(body)["code"]) == (503, "draining")
    assert "retry-after" in headers
