"""One request and its answer over a connection, within a time and a number of bytes."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2

from loraseg.client.address import Address
from loraseg.client.asking import Question
from loraseg.client.parsing import bad_reply, refusal
from loraseg.client.retry import Patience, connection_error, retry_after_s
from loraseg.errors import ServiceError

__all__ = ["Answer", "Lines", "connect", "exchange", "exchange_lines"]

_CONNECT_S = 10.0
_PROBLEM_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        body: All of it.
        date: When, by the endpoint's clock, as in the header; None if it did not say.
        tls: The secured connection, None for plain HTTP.
    """

    body: bytes
    date: str | None
    tls: ssl.SSLObject | None


class Lines:
    """Puts lines together from chunks; one may have at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that the chunk completes.

        Raises:
            ServiceError: ``bad_reply``: a line is too long.
        """
        *complete, rest = chunk.split(b"\n")
        lines: list[bytes] = []
        for part in complete:
            self._rest += part
            self._check()
            lines.append(bytes(self._rest))
            self._rest.clear()
        self._rest += rest
        self._check()
        return [line for line in lines if line.strip()]

    def _check(self) -> None:
        if len(self._rest) > self._limit:
            raise bad_reply(f"a line of over {self._limit} bytes")


def connect(address: Address, token: str | None) -> httpx2.AsyncClient:
    """Return a pool of connections that sends the token, if any, to this address only."""
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return httpx2.AsyncClient(
        headers=headers,
        # How long an answer may take is bounded as a whole, whatever it trickles in meanwhile.
        timeout=httpx2.Timeout(None, connect=_CONNECT_S),
        follow_redirects=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        # A proxy from the environment would read what plain HTTP carries.
        trust_env=address.is_encrypted,
    )


async def exchange(
    http: httpx2.AsyncClient, address: Address, question: Question, left_s: float
) -> Answer:
    """Ask once and read the whole answer.

    Raises:
        ServiceError: The endpoint's refusal; ``unreachable``; ``bad_reply`` for an answer that is
            too long; ``deadline`` after ``left_s`` seconds. A ``PassingError`` may be retried.
    """
    async with _within(left_s, address), _asked(http, address, question) as response:
        body = await _read(response, question.limit)
        return Answer(body, response.headers.get("date"), _tls(response))


async def exchange_lines(
    http: httpx2.AsyncClient, address: Address, question: Question, patience: Patience
) -> AsyncGenerator[bytes, None]:
    """Ask once and yield the answer line by line as it comes, until the patience is over.

    Raises:
        ServiceError: As for :func:`exchange`; the limit is that of a line.
    """
    async with contextlib.AsyncExitStack() as stack:
        # A deadline must not reach over a yield: what the caller does meanwhile takes its time.
        async with _within(patience.left_s, address):
            asked = _asked(http, address, question)
            response = await stack.enter_async_context(asked)
        chunks, buffer = response.aiter_raw(), Lines(question.limit)
        while True:
            with _worded(address):
                async with _within(patience.left_s, address):
                    chunk = await anext(chunks, None)
            if chunk is None:
                return
            for line in buffer.feed(chunk):
                yield line


@contextlib.asynccontextmanager
async def _asked(
    http: httpx2.AsyncClient, address: Address, question: Question
) -> AsyncGenerator[httpx2.Response]:
    """Send the question; the response is a success whose body has not been read."""
    with _worded(address):
        async with http.stream(
            question.method,
            f"{address.url}{question.path}",
            params=dict(question.params),
            data=dict(question.form) or None,
            files=list(question.files) or None,
        ) as response:
            if response.status_code != HTTPStatus.OK:
                body = await _read(response, _PROBLEM_BYTES)
                wait_s = retry_after_s(response.headers.get("retry-after"))
                raise refusal(response.status_code, body, wait_s)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise bad_reply("it is compressed, which was not asked for")
            yield response


async def _read(response: httpx2.Response, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > limit:
            raise bad_reply(f"over {limit} bytes")
    return bytes(body)


@contextlib.contextmanager
def _worded(address: Address) -> Generator[None]:
    try:
        yield
    except httpx2.TransportError as error:
        raise connection_error(error, address.url) from error


@contextlib.asynccontextmanager
async def _within(left_s: float, address: Address) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(left_s):
            yield
    except TimeoutError as error:
        raise ServiceError("deadline", f"{address.url}: no answer in {left_s:.3g} s") from error


def _tls(response: httpx2.Response) -> ssl.SSLObject | None:
    stream = response.extensions.get("network_stream")
    return None if stream is None else stream.get_extra_info("ssl_object")
