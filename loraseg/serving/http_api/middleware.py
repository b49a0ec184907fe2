"""The outermost middleware: request ids, limits of bodies, logging, and responses for errors."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraseg.errors import ServiceError
from loraseg.serving.config import Limits
from loraseg.serving.http_api.headers import header, request_id
from loraseg.serving.http_api.problems import as_service_error, problem_response

__all__ = ["ClientDisconnectedError", "RequestContext", "RequestMiddleware", "request_context"]

logger = logging.getLogger(__name__)

_SCOPE_KEY = "loraseg.request"
# Slower clients are disconnected, since they occupy memory and a slot of their token.
_SEND_TIMEOUT_S = 120.0
# After an error the rest of the upload is read for this time: closing a connection with unread
# bytes resets it, and the client would see the reset instead of the response.
_DISCARD_TIMEOUT_S = 2.0
_CLIENT_CLOSED_REQUEST = 499
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


class ClientDisconnectedError(Exception):
    """The client closed the connection before the response was complete."""


@dataclass(slots=True)
class RequestContext:
    """Data of one request, for logs, metrics and the routes.

    Attributes:
        request_id: The client's if it is valid, else a new one.
        arrived_at: As ``time.time()``.
        method: HTTP method.
        route: Template of the path, such as ``/v1/adapters/{name}``; ``-`` if none matched.
        token_name: Name of its token, None before authentication.
        status: Of the response; 499 if the client disconnected first.
        problem_code: Error code, None for success.
        bytes_in: Received bytes of the body.
        bytes_out: Sent bytes of the response's body.
        duration_s: From arrival to the last byte of the response; set at the end.
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
    """Return the context that :class:`RequestMiddleware` stored in an ASGI scope."""
    return scope[_SCOPE_KEY]


class RequestMiddleware:
    """ASGI middleware around the whole API.

    Args:
        app: The API.
        limits: Of the body.
        on_complete: Called after each request, for metrics.
        send_request_id: Whether responses get X-Request-ID; False behind a proxy that adds it.
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
        context = RequestContext(request_id(scope), method=scope["method"])
        body = _LimitedBody(receive, context, self._limits, _content_length(scope))
        writer = _ResponseWriter(send, context, body, send_request_id=self._send_request_id)
        scope[_SCOPE_KEY] = context
        if scope["method"] == "HEAD":
            # A server that supports GET must support HEAD (RFC 9110, section 9.1).
            scope = {**scope, "method": "GET"}
            writer.omit_body = True
        try:
            await self._handle(scope, body, writer, context)
        except asyncio.CancelledError:
            context.status = _CLIENT_CLOSED_REQUEST
            raise
        finally:
            self._report(context, scope)

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
            service_error = as_service_error(error)
            context.problem_code = service_error.code
            if service_error.code == "internal":
                logger.error("request %s failed", context.request_id, exc_info=error)
            if not writer.started:
                response = problem_response(service_error, context.request_id)
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
        # The route, not the path, which the client controls.
        logger.info("%s %s %s", context.method, context.route, context.status, extra=fields)
        if self._on_complete is not None:
            self._on_complete(context)


class _LimitedBody:
    """A request body with limits of size and time."""

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
        """Whether a part of the body has not been received."""
        return self._content_length != 0 and not self._is_complete

    def check_content_length(self) -> None:
        """Raise ServiceError if Content-Length is above the limit."""
        if self._content_length is not None and self._content_length > self._limits.body_bytes:
            raise self._too_large(f"{self._content_length} bytes")

    async def receive(self) -> Message:
        """Receive a message; raise ServiceError beyond the limits."""
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
            raise self._too_large(f"over {self._limits.body_bytes} bytes")
        self._is_complete = not message.get("more_body", False)
        return message

    async def discard_remaining(self) -> None:
        """Read and discard the rest of the body, for a limited time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_TIMEOUT_S):
                while self.is_pending:
                    message = await self._receive()
                    is_disconnect = message["type"] == "http.disconnect"
                    self._is_complete = is_disconnect or not message.get("more_body", False)

    def _too_large(self, got: str) -> ServiceError:
        limit = self._limits.body_bytes
        return ServiceError("body_too_large", f"Got {got}, expected at most {limit} bytes.")


class _ResponseWriter:
    """Wraps ``send``: adds headers, counts bytes and limits the time of each message."""

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
        """Send a message; raise ClientDisconnectedError if that fails or takes too long."""
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


def _content_length(scope: Scope) -> int | None:
    """Return Content-Length: 0 without a body, None for a body of unknown length."""
    value = header(scope["headers"], b"content-length")
    if value is not None and value.isdigit() and len(value) <= 18:
        return int(value)
    is_chunked = header(scope["headers"], b"transfer-encoding") is not None
    return None if value is not None or is_chunked else 0
