"""Counts the requests of a gateway, and rejects new ones during shutdown."""

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from loraseg.inference.service_errors import draining_error
from loraseg.serving.http_api.headers import request_id
from loraseg.serving.http_api.problems import problem_response

__all__ = ["DrainMiddleware", "DrainState"]


@dataclass(eq=False, slots=True)
class DrainState:
    """State of a gateway.

    Attributes:
        is_draining: Whether new requests get 503 ``draining``; running ones are finished.
        in_flight: Number of running requests.
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
            await problem_response(draining_error(), request_id(scope))(scope, receive, send)
            return
        self._state.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.in_flight -= 1
