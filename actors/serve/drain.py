"""Counts the requests in a gateway, and turns new ones away once it is closing."""

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from loraseg.errors import ServiceError
from loraseg.serving.http_api.problems import problem_response

__all__ = ["DrainMiddleware", "DrainState"]


@dataclass(eq=False, slots=True)
class DrainState:
    """The way into a gateway.

    Attributes:
        is_draining: Whether new requests are answered with 503 ``draining``; what is in work goes
            on.
        in_flight: How many requests are inside.
    """

    is_draining: bool = False
    in_flight: int = 0


class DrainMiddleware:
    """ASGI middleware around the API."""

    def __init__(self, app: ASGIApp, state: DrainState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._state.is_draining:
            error = ServiceError("draining", "the service is shutting down", retry_after_s=10.0)
            headers = dict(scope["headers"])
            request_id = headers.get(b"x-request-id", b"").decode("latin-1")
            await problem_response(error, request_id)(scope, receive, send)
            return
        self._state.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.in_flight -= 1
