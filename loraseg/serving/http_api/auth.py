"""Who may come in, how many at once, and how much memory their images may take together."""

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
    """Whom a request comes from.

    Attributes:
        name: Of the token; empty where no tokens are asked for.
        visible: Name patterns of the adapters it sees, None for all.
        max_concurrent: How many requests it may have in work.
    """

    name: str
    visible: tuple[str, ...] | None
    max_concurrent: int


class Authenticator:
    """Checks tokens and counts the requests in work. Used from one event loop."""

    def __init__(self, token_store: TokenStore | None, limits: Limits) -> None:
        self._token_store = token_store
        self._limits = limits
        self._in_flight: Counter[str] = Counter()

    async def authenticate(self, request: Request, role: Role) -> Principal:
        """Return whom a request comes from.

        Raises:
            ServiceError: ``unauthorized``, or ``forbidden`` if the token lacks the role.
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
        """Read the token file again, without waiting for a slow store."""
        reading = asyncio.ensure_future(asyncio.to_thread(token_store.reload))
        await asyncio.wait([reading], timeout=_RELOAD_TIMEOUT_S)

    @contextmanager
    def acquire_slot(self, principal: Principal) -> Generator[None, None, None]:
        """Hold one of the caller's places.

        Raises:
            ServiceError: ``too_many_requests``.
        """
        if self._in_flight[principal.name] >= principal.max_concurrent:
            raise ServiceError(
                "too_many_requests",
                f"{principal.max_concurrent} requests of this token are in work, which is all "
                f"it may.",
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
    """Bytes that requests may hold together; whoever comes later waits. First come, first served.

    Used from one event loop.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._free = limit_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, size_bytes: int) -> AsyncGenerator[None, None]:
        """Set bytes aside; a demand above the whole budget waits until it is alone."""
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
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._free += size
            self._wake_waiters()
            raise

    def _wake_waiters(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if not turn.done():
                if size > self._free:
                    return
                self._free -= size
                turn.set_result(None)
            self._waiting.popleft()


def _bearer_token(request: Request) -> str:
    given = request.headers.getlist("authorization")
    match = _BEARER_PATTERN.fullmatch(given[0]) if len(given) == 1 else None
    if match is None:
        raise ServiceError("unauthorized", "Expected one header 'Authorization: Bearer <token>'.")
    return match[1]
