"""What Serve's HTTP proxies do in front of the gateways.

``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=actors.proxying:middlewares`` in the
environment that
Ray is started with puts it there. Without it, the client of a gateway that is killed is told 500
without a reason, where it should be told to try again.
"""

import re
import uuid

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraseg.errors import ServiceError
from loraseg.serving.http_api.problems import PROBLEM_TYPES, problem_response

__all__ = ["CALLBACK", "ProxyErrorMiddleware", "middlewares"]

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "actors.proxying:middlewares"}

_REQUEST_ID_HEADER = b"x-request-id"
_VALID_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def middlewares() -> list[Middleware]:
    """Return what each proxy wraps around itself."""
    return [Middleware(ProxyErrorMiddleware)]


class ProxyErrorMiddleware:
    """Answers in the API's words for a gateway that is lost, or has no room, or is not there yet.

    A request id that is not plain is replaced before the proxy repeats it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0].lower() != _REQUEST_ID_HEADER]
        given = [value for key, value in scope["headers"] if key.lower() == _REQUEST_ID_HEADER]
        named = (
            given[0]
            if given and _VALID_REQUEST_ID.fullmatch(given[0])
            else uuid.uuid4().hex.encode()
        )
        scope = {**scope, "headers": [*headers, (_REQUEST_ID_HEADER, named)]}
        answer = _ResponseInterceptor(send)
        await self._app(scope, receive, answer.send)
        if answer.is_started and answer.error is None:
            return
        error = answer.error or ServiceError(
            "replica_lost", "the gateway that worked on the request was lost", retry_after_s=2.0
        )
        response = problem_response(error, named.decode())
        response.headers["X-Request-ID"] = named.decode()
        await response(scope, receive, send)


class _ResponseInterceptor:
    """The way back; keeps from the client what Serve says in its own words."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_started = False
        self.error: ServiceError | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_started = True
            self.error = _serve_error(message)
        if self.error is None:
            await self._send(message)


def _serve_error(start: Message) -> ServiceError | None:
    """Return what to say instead of a refusal by Serve itself; None for the API's own answers."""
    kinds = [value for key, value in start["headers"] if key.lower() == b"content-type"]
    if start["status"] not in (500, 503) or not kinds or not kinds[0].startswith(b"text/plain"):
        return None
    if start["status"] == PROBLEM_TYPES["overloaded"].status:
        return ServiceError("overloaded", "no gateway has room", retry_after_s=1.0)
    return ServiceError("replica_lost", "no gateway answered", retry_after_s=2.0)
