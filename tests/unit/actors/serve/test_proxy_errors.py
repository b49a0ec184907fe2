"""What the proxy says for a gateway that does not; the gateway is a small ASGI app."""

import asyncio
import json

import pytest

from actors.serve.drain import DrainMiddleware, DrainState
from actors.serve.proxy_errors import ProxyErrorMiddleware, middlewares


def get(app, path="/v1/base", headers=()):
    """Return status, headers and body that an ASGI app answers with."""
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


def answering(status, kind, content=b"words"):
    async def app(scope, receive, send):
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app


async def silent(scope, receive, send):
    """As the proxy when the gateway that it had sent the request to is dead."""


def test_serve_takes_it_as_a_middleware():
    [middleware] = middlewares()
    assert middleware.cls is ProxyErrorMiddleware


def test_a_request_that_nobody_answers_is_told_to_come_back():
    status, headers, body = get(ProxyErrorMiddleware(silent), headers=[(b"x-request-id", b"mine")])
    problem = json.loads(body)
    assert (status, problem["code"], problem["request_id"]) == (503, "replica_lost", "mine")
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == "mine"
    assert int(headers["retry-after"]) >= 1


@pytest.mark.parametrize(("status", "code"), [(503, "overloaded"), (500, "replica_lost")])
def test_a_refusal_in_serves_own_words_is_put_into_the_apis(status, code):
    told, headers, body = get(ProxyErrorMiddleware(answering(status, b"text/plain; charset=utf-8")))
    assert (told, json.loads(body)["code"]) == (503, code)
    assert b"words" not in body
    assert "retry-after" in headers


@pytest.mark.parametrize("status", [200, 404, 500, 503])
def test_the_apis_answers_pass_unchanged(status):
    told, _, body = get(ProxyErrorMiddleware(answering(status, b"application/problem+json")))
    assert (told, body) == (status, b"words")


def test_serves_own_paths_pass_unchanged():
    told, _, body = get(ProxyErrorMiddleware(answering(503, b"text/plain")), path="/-/healthz")
    assert (told, body) == (503, b"words")


@pytest.mark.parametrize("given", [b"a b", b"<script>", b"x" * 65, b""])
def test_a_request_id_that_is_not_plain_is_replaced(given):
    seen = []

    async def app(scope, receive, send):
        seen.extend(value for key, value in scope["headers"] if key == b"x-request-id")

    get(ProxyErrorMiddleware(app), headers=[(b"X-Request-ID", given)])
    [named] = seen
    assert named != given
    assert named.isalnum()


def test_a_closed_doorman_turns_new_requests_away_and_counts_those_inside():
    async def scenario():
        leave = asyncio.Event()

        async def app(scope, receive, send):
            await leave.wait()

        door = DrainState()
        doorman = DrainMiddleware(app, door)
        inside = asyncio.create_task(doorman({"type": "http", "headers": []}, None, None))
        await asyncio.sleep(0)
        door.is_draining = True
        assert door.in_flight == 1
        leave.set()
        await inside
        assert door.in_flight == 0
        return doorman

    status, headers, body = get(asyncio.run(scenario()))
    assert (status, json.loads(body)["code"]) == (503, "draining")
    assert "retry-after" in headers
