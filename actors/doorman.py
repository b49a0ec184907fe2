"""Counts the requests in a gateway, and turns new ones away once it is closing."""

from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from loraseg.errors import ServiceError
from loraseg.serving.problems import problem_response

__all__ = ["Door", "Doorman"]


@dataclass(eq=False, slots=True)
class Door:
    """The way into a gateway.

    Attributes:
        is_closed: Whether new requests are answered with 503 ``draining``; what is in work goes on.
        in_work: How many requests are inside.
    """

    is_closed: bool = False
    in_work: int = 0


class Doorman:
    """ASGI middleware around the API."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._door.is_closed:
            error = ServiceError("draining", "the service is shutting down", retry_after_s=10.0)
            headers = dict(scope["headers"])
            request_id = headers.get(b"x-request-id", b"").decode("latin-1")
            await problem_response(error, request_id)(scope, receive, send)
            return
        self._door.in_work += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._door.in_work -= 1
