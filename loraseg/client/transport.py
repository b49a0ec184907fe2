"""One request and its response, with limits of time and size."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2

from loraseg.client.endpoint import Endpoint
from loraseg.client.parsing import invalid_response, response_error
from loraseg.client.requests import Request
from loraseg.client.retry import Deadline, connection_error, parse_retry_after
from loraseg.errors import ServiceError

__all__ = ["LineBuffer", "Response", "connect", "send", "stream_lines"]

_CONNECT_TIMEOUT_S = 10.0
_MAX_PROBLEM_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Response:
    """A response with status 200.

    Attributes:
        body: The whole body.
        date: The header ``Date``, None if absent.
        tls: The TLS connection, None for plain HTTP.
    """

    body: bytes
    date: str | None
    tls: ssl.SSLObject | None


class LineBuffer:
    """Joins chunks into lines of at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._partial = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that the chunk completes, without empty ones.

        Raises:
            ServiceError: ``bad_reply``: a line is too long.
        """
        *complete, rest = chunk.split(b"\n")
        lines: list[bytes] = []
        for part in complete:
            self._partial += part
            self._check_limit()
            lines.append(bytes(self._partial))
            self._partial.clear()
        self._partial += rest
        self._check_limit()
        return [line for line in lines if line.strip()]

    def _check_limit(self) -> None:
        if len(self._partial) > self._limit:
            raise invalid_response(f"a line of over {self._limit} bytes")


def connect(endpoint: Endpoint, token: str | None) -> httpx2.AsyncClient:
    """Return a connection pool that sends the token, if any, to this endpoint only."""
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return httpx2.AsyncClient(
        headers=headers,
        # Timeouts of single reads do not limit a slow response; _timeout() limits the whole.
        timeout=httpx2.Timeout(None, connect=_CONNECT_TIMEOUT_S),
        follow_redirects=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        # A proxy of the environment could read plain HTTP.
        trust_env=endpoint.is_encrypted,
    )


async def send(
    http: httpx2.AsyncClient, endpoint: Endpoint, request: Request, timeout_s: float
) -> Response:
    """Send a request once and read the whole response.

    Raises:
        ServiceError: The endpoint's error; ``unreachable``; ``bad_reply`` for a response that is
            too long; ``deadline`` after ``timeout_s`` seconds. A ``RetryableError`` is temporary.
    """
    async with _timeout(timeout_s, endpoint), _request(http, endpoint, request) as response:
        body = await _read_body(response, request.max_response_bytes)
        return Response(body, response.headers.get("date"), _tls_object(response))


async def stream_lines(
    http: httpx2.AsyncClient, endpoint: Endpoint, request: Request, deadline: Deadline
) -> AsyncGenerator[bytes, None]:
    """Send a request once and yield the lines of the response as they arrive.

    Raises:
        ServiceError: As for :func:`send`; the size limit is that of a line.
    """
    async with contextlib.AsyncExitStack() as stack:
        # No timeout may span a yield: the caller's own work would count.
        async with _timeout(deadline.remaining_s, endpoint):
            response = await stack.enter_async_context(_request(http, endpoint, request))
        chunks, buffer = response.aiter_raw(), LineBuffer(request.max_response_bytes)
        while True:
            with _map_errors(endpoint):
                async with _timeout(deadline.remaining_s, endpoint):
                    chunk = await anext(chunks, None)
            if chunk is None:
                return
            for line in buffer.feed(chunk):
                yield line


@contextlib.asynccontextmanager
async def _request(
    http: httpx2.AsyncClient, endpoint: Endpoint, request: Request
) -> AsyncGenerator[httpx2.Response]:
    """Send a request and yield the response, whose status is 200, before its body is read."""
    with _map_errors(endpoint):
        async with http.stream(
            request.method,
            f"{endpoint.url}{request.path}",
            params=dict(request.params),
            data=dict(request.form) or None,
            files=list(request.files) or None,
        ) as response:
            if response.status_code != HTTPStatus.OK:
                body = await _read_body(response, _MAX_PROBLEM_BYTES)
                wait_s = parse_retry_after(response.headers.get("retry-after"))
                raise response_error(response.status_code, body, wait_s)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise invalid_response("it is compressed although the request does not allow it")
            yield response


async def _read_body(response: httpx2.Response, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > limit:
            raise invalid_response(f"over {limit} bytes")
    return bytes(body)


@contextlib.contextmanager
def _map_errors(endpoint: Endpoint) -> Generator[None]:
    try:
        yield
    except httpx2.TransportError as error:
        raise connection_error(error, endpoint.url) from error


@contextlib.asynccontextmanager
async def _timeout(timeout_s: float, endpoint: Endpoint) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise ServiceError(
            "deadline", f"{endpoint.url}: no response in {timeout_s:.3g} s"
        ) from error


def _tls_object(response: httpx2.Response) -> ssl.SSLObject | None:
    stream = response.extensions.get("network_stream")
    return None if stream is None else stream.get_extra_info("ssl_object")
