"""The outermost layer of the API: bounds bodies, names requests, logs them, words every failure."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraseg.errors import ServiceError
from loraseg.serving.config import Limits
from loraseg.serving.http_api.problems import as_service_error, problem_response

__all__ = ["ClientDisconnectedError", "RequestContext", "RequestMiddleware", "request_context"]

logger = logging.getLogger(__name__)

_SCOPE_KEY = "loraseg.visit"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# A client that reads this slowly holds memory and a place in the queue for nothing.
_SEND_TIMEOUT_S = 120.0
# A refused upload is read on for a moment: a connection that is closed with unread bytes is reset,
# and the client would see the reset instead of the reason.
_DISCARD_TIMEOUT_S = 2.0
_CLIENT_CLOSED_REQUEST = 499
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


class ClientDisconnectedError(Exception):
    """Nobody is there to hear the answer."""


@dataclass(slots=True)
class RequestContext:
    """One request on its way through the API.

    Attributes:
        request_id: The client's, if it is short and plain, else a new one.
        arrived_at: As ``time.time()``.
        method: HTTP method.
        route: Template of the path, such as ``/v1/adapters/{name}``; ``-`` if none matched.
        token_name: Name of the token that it came with, once that is checked.
        status: Of the answer; 499 when the client left before.
        problem_code: Of the problem, None for an answer.
        bytes_in: Of the body so far.
        bytes_out: Of the answer's body.
        duration_s: From arrival to the last byte of the answer; set at the end.
    """

    request_id: str
    arrived_at: float = field(default_factory=time.time)
    method: str = ""
    route: str = "-"
    token_name: str | None = None
    status: int = 0
    problem_code: str | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    duration_s: float = 0.0


def request_context(scope: Scope) -> RequestContext:
    """Return the visit that the guard opened for a request."""
    return scope[_SCOPE_KEY]


class RequestMiddleware:
    """ASGI middleware around the whole API.

    Args:
        app: The API.
        limits: Of the body.
        on_complete: Told about each request when it is over, for metrics.
        send_request_id: Whether answers get X-Request-ID; False behind a proxy that writes it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        on_complete: Callable[[RequestContext], None] | None = None,
        send_request_id: bool = True,
    ) -> None:
        self._app = app
        self._limits = limits
        self._on_complete = on_complete
        self._send_request_id = send_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = RequestContext(_request_id(scope), method=scope["method"])
        body = _LimitedBody(receive, visit, self._limits, _content_length(scope))
        answer = _ResponseWriter(send, visit, body, send_request_id=self._send_request_id)
        scope[_SCOPE_KEY] = visit
        if scope["method"] == "HEAD":
            # Whoever takes GET takes HEAD (RFC 9110, section 9.1).
            scope = {**scope, "method": "GET"}
            answer.omit_body = True
        try:
            await self._handle(scope, body, answer, visit)
        except asyncio.CancelledError:
            visit.status = _CLIENT_CLOSED_REQUEST
            raise
        finally:
            self._report(visit, scope)

    async def _handle(
        self, scope: Scope, body: "_LimitedBody", writer: "_ResponseWriter", context: RequestContext
    ) -> None:
        started = time.perf_counter()
        try:
            body.check_content_length()
            await self._app(scope, body.receive, writer.send)
        except ClientDisconnectedError:
            context.status = _CLIENT_CLOSED_REQUEST
        except Exception as error:
            told = as_service_error(error)
            context.problem_code = told.code
            if told.code == "internal":
                logger.error("request %s failed", context.request_id, exc_info=error)
            if not writer.started:
                response = problem_response(told, context.request_id)
                with suppress(ClientDisconnectedError):
                    await response(scope, body.receive, writer.send)
        finally:
            context.duration_s = time.perf_counter() - started

    def _report(self, context: RequestContext, scope: Scope) -> None:
        context.route = getattr(scope.get("route"), "path", "-")
        fields = {
            "request_id": context.request_id,
            "method": context.method,
            "route": context.route,
            "status": context.status,
            "code": context.problem_code,
            "duration_ms": round(1000 * context.duration_s, 2),
            "bytes_in": context.bytes_in,
            "bytes_out": context.bytes_out,
            "token": context.token_name,
        }
        # The route, not the path: a path is the client's text, a template is ours.
        logger.info("%s %s %s", context.method, context.route, context.status, extra=fields)
        if self._on_complete is not None:
            self._on_complete(context)


class _LimitedBody:
    """A request body that may be only so large and take only so long."""

    def __init__(
        self, receive: Receive, context: RequestContext, limits: Limits, content_length: int | None
    ) -> None:
        self._receive = receive
        self._context = context
        self._limits = limits
        self._content_length = content_length
        self._deadline = asyncio.get_running_loop().time() + limits.body_timeout_s
        self._is_complete = False

    @property
    def is_pending(self) -> bool:
        """Whether the client announced a body that has not wholly arrived."""
        return self._content_length != 0 and not self._is_complete

    def check_content_length(self) -> None:
        """Refuse a body by its Content-Length, before a byte of it is read."""
        if self._content_length is not None and self._content_length > self._limits.body_bytes:
            raise self._too_large(f"{self._content_length} bytes")

    async def receive(self) -> Message:
        """Receive a message; raises ServiceError beyond the bounds."""
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise ServiceError(
                "body_timeout",
                f"The body was not complete after {self._limits.body_timeout_s:g} s.",
            ) from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        self._context.bytes_in += len(message.get("body", b""))
        if self._context.bytes_in > self._limits.body_bytes:
            raise self._too_large("more")
        self._is_complete = not message.get("more_body", False)
        return message

    async def discard_remaining(self) -> None:
        """Read and forget what still comes, for a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_TIMEOUT_S):
                while self.is_pending:
                    message = await self._receive()
                    gone = message["type"] == "http.disconnect"
                    self._is_complete = gone or not message.get("more_body", False)

    def _too_large(self, got: str) -> ServiceError:
        most = self._limits.body_bytes
        return ServiceError("body_too_large", f"At most {most} bytes are taken, got {got}.")


class _ResponseWriter:
    """The way back: counts, adds headers, and gives up on a client that does not read."""

    def __init__(
        self, send: Send, context: RequestContext, body: _LimitedBody, *, send_request_id: bool
    ) -> None:
        self._send = send
        self._context = context
        self._body = body
        self._send_request_id = send_request_id
        self.started = False
        self.omit_body = False

    async def send(self, message: Message) -> None:
        """Send a message; raises ClientDisconnectedError when it cannot be delivered."""
        if message["type"] == "http.response.start":
            self.started = True
            self._context.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._extra_headers()]}
        elif message["type"] == "http.response.body":
            if self.omit_body:
                message = {**message, "body": b""}
            self._context.bytes_out += len(message.get("body", b""))
            if not message.get("more_body", False) and self._body.is_pending:
                await self._send_with_timeout({**message, "more_body": True})
                await self._body.discard_remaining()
                message = {"type": "http.response.body", "body": b""}
        await self._send_with_timeout(message)

    def _extra_headers(self) -> list[tuple[bytes, bytes]]:
        headers = list(_SECURITY_HEADERS)
        if self._send_request_id:
            headers.append((b"x-request-id", self._context.request_id.encode()))
        if self._body.is_pending:
            headers.append((b"connection", b"close"))
        return headers

    async def _send_with_timeout(self, message: Message) -> None:
        try:
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await self._send(message)
        except (TimeoutError, OSError) as error:
            raise ClientDisconnectedError from error


def _request_id(scope: Scope) -> str:
    given = _header(scope, b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return uuid.uuid4().hex


def _content_length(scope: Scope) -> int | None:
    """Return the announced length: 0 for none, None for a body of unknown length."""
    given = _header(scope, b"content-length")
    if given is not None and given.isdigit() and len(given) <= 18:
        return int(given)
    return None if given is not None or _header(scope, b"transfer-encoding") is not None else 0


def _header(scope: Scope, name: bytes) -> Any:
    return next((value for key, value in scope["headers"] if key.lower() == name), None)
