"""Middleware of Serve's HTTP proxies: problem details for errors outside the gateways.

Ray loads it if its environment has
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=actors.proxying:middlewares``. Without it, clients of a
gateway that is killed get status 500 without problem details, which they would not retry.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraseg.errors import ServiceError
from loraseg.serving.http_api.headers import REQUEST_ID, header, request_id
from loraseg.serving.http_api.problems import PROBLEM_TYPES, problem_response

__all__ = ["CALLBACK", "ProxyErrorMiddleware", "middlewares"]

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "actors.proxying:middlewares"}


def middlewares() -> list[Middleware]:
    """Return the middlewares of each proxy."""
    return [Middleware(ProxyErrorMiddleware)]


class ProxyErrorMiddleware:
    """Responds with problem details if no gateway does: it was lost, is overloaded or not started.

    An invalid X-Request-ID is replaced before the proxy copies it into the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        own_id = request_id(scope)
        headers = [pair for pair in scope["headers"] if pair[0].lower() != REQUEST_ID]
        scope = {**scope, "headers": [*headers, (REQUEST_ID, own_id.encode())]}
        interceptor = _ResponseInterceptor(send)
        await self._app(scope, receive, interceptor.send)
        if interceptor.is_started and interceptor.error is None:
            return
        error = interceptor.error or ServiceError(
            "replica_lost", "the gateway that processed the request was lost", retry_after_s=2.0
        )
        response = problem_response(error, own_id)
        response.headers["X-Request-ID"] = own_id
        await response(scope, receive, send)


class _ResponseInterceptor:
    """Wraps ``send``: withholds error responses that Serve itself generates."""

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
    """Return the error that replaces a response of Serve itself; None for one of the API."""
    media_type = header(start["headers"], b"content-type") or b""
    if start["status"] not in (500, 503) or not media_type.startswith(b"text/plain"):
        return None
    if start["status"] == PROBLEM_TYPES["overloaded"].status:
        return ServiceError("overloaded", "all gateways are overloaded", retry_after_s=1.0)
    return ServiceError("replica_lost", "no gateway responded", retry_after_s=2.0)
