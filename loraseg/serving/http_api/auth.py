"""Authentication by bearer tokens, concurrency limits and a memory budget."""

import asyncio
import re
from collections import Counter, deque
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from starlette.requests import Request

from loraseg.errors import ServiceError
from loraseg.serving.config import Limits
from loraseg.serving.http_api.middleware import request_context
from loraseg.serving.tokens import Role, TokenStore

__all__ = ["Authenticator", "MemoryBudget", "Principal"]

_RELOAD_TIMEOUT_S = 1.0
_BEARER_PATTERN = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/=-]{1,512})")


@dataclass(frozen=True, slots=True)
class Principal:
    """The sender of a request.

    Attributes:
        name: Of the token; empty in a service without tokens.
        visible: Name patterns of the adapters that it may see, None for all.
        max_concurrent: Limit of its concurrent requests.
    """

    name: str
    visible: tuple[str, ...] | None
    max_concurrent: int


class Authenticator:
    """Checks tokens and counts concurrent requests. Used from one event loop."""

    def __init__(self, token_store: TokenStore | None, limits: Limits) -> None:
        self._token_store = token_store
        self._limits = limits
        self._in_flight: Counter[str] = Counter()

    async def authenticate(self, request: Request, role: Role) -> Principal:
        """Return the sender of a request.

        Raises:
            ServiceError: ``unauthorized``, or ``forbidden`` if the token does not have the role.
        """
        if self._token_store is None:
            if role == "admin":
                raise ServiceError(
                    "forbidden", "Admin routes are closed on a service without a token file."
                )
            return Principal("", None, self._limits.concurrent)
        if self._token_store.needs_reload:
            await self._reload_tokens(self._token_store)
        token = self._token_store.authenticate(_bearer_token(request))
        request_context(request.scope).token_name = token.name
        if role not in token.roles:
            raise ServiceError("forbidden", f"The token does not have the role {role!r}.")
        concurrent = token.concurrent or self._limits.concurrent
        return Principal(token.name, token.adapters, min(concurrent, self._limits.concurrent))

    async def _reload_tokens(self, token_store: TokenStore) -> None:
        """Read the token file again, but do not wait long for a slow store."""
        reload = asyncio.ensure_future(asyncio.to_thread(token_store.reload))
        await asyncio.wait([reload], timeout=_RELOAD_TIMEOUT_S)

    @contextmanager
    def acquire_slot(self, principal: Principal) -> Generator[None, None, None]:
        """Count a concurrent request of the principal.

        Raises:
            ServiceError: ``too_many_requests``.
        """
        if self._in_flight[principal.name] >= principal.max_concurrent:
            raise ServiceError(
                "too_many_requests",
                f"{principal.max_concurrent} requests of this token are running: the limit.",
                retry_after_s=1.0,
            )
        self._in_flight[principal.name] += 1
        try:
            yield
        finally:
            self._in_flight[principal.name] -= 1
            if not self._in_flight[principal.name]:
                del self._in_flight[principal.name]


class MemoryBudget:
    """Limits the memory of concurrent requests; later requests wait in order of arrival.

    Used from one event loop.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._free = limit_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, size_bytes: int) -> AsyncGenerator[None, None]:
        """Reserve bytes; a request above the whole budget waits until it is the only one."""
        size = min(size_bytes, self._limit)
        await self._acquire(size)
        try:
            yield
        finally:
            self._free += size
            self._wake_waiters()

    async def _acquire(self, size: int) -> None:
        if not self._waiting and size <= self._free:
            self._free -= size
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._free += size
            self._wake_waiters()
            raise

    def _wake_waiters(self) -> None:
        while self._waiting:
            size, granted = self._waiting[0]
            if not granted.done():
                if size > self._free:
                    return
                self._free -= size
                granted.set_result(None)
            self._waiting.popleft()


def _bearer_token(request: Request) -> str:
    values = request.headers.getlist("authorization")
    match = _BEARER_PATTERN.fullmatch(values[0]) if len(values) == 1 else None
    if match is None:
        raise ServiceError("unauthorized", "Expected one header 'Authorization: Bearer <token>'.")
    return match[1]
