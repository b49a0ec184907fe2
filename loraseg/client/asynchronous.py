"""The client for programmes with an event loop; the other one is a shell around it."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Unpack
from urllib.parse import quote

from loraseg import seeding
from loraseg.client.address import check_address
from loraseg.client.asking import Options, Question, fields, segment_question
from loraseg.client.batches import Batch, Group, groups
from loraseg.client.parsing import Node, parse_adapter, parse_json, parse_library, parse_reply
from loraseg.client.pictures import ImageInput, prepare
from loraseg.client.reply import AdapterInfo, LibraryInfo, Reply
from loraseg.client.retry import Patience, pause_s
from loraseg.client.transfer import Answer, connect, exchange, exchange_lines
from loraseg.errors import ConfigError, LorasegError, ServiceError

__all__ = ["AsyncClient"]

logger = logging.getLogger(__name__)


class AsyncClient:
    """Talks to an endpoint, on asyncio. Any number of calls may be under way at once.

    Args:
        url: Of the endpoint: ``https://host[:port][/path]``.
        token: Bearer token. It is sent to this endpoint alone, and never shown.
        timeout_s: For a call with all its attempts.
        retries: Most further attempts after 429, 503 and broken connections.
        allow_insecure: Send the token over plain HTTP to another machine.

    Raises:
        ConfigError: The URL, the token or a number is unfit; or the token would travel unencrypted
            to another machine.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 60.0,
        retries: int = 4,
        allow_insecure: bool = False,
    ) -> None:
        if not 0 < timeout_s < float("inf") or retries < 0:
            raise ConfigError(
                f"timeout_s {timeout_s}, retries {retries}: expected above 0, and 0 or more"
            )
        self.address = check_address(url, token, allow_insecure=allow_insecure)
        self._timeout_s = timeout_s
        self._retries = retries
        self._http = connect(self.address, token)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address.url!r})"

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def segment(
        self, image: ImageInput, classes: Sequence[str], **options: Unpack[Options]
    ) -> Reply:
        """Segment an image.

        Args:
            image: RGB, uint8 (h, w, 3); or a PNG or JPEG file, as bytes or as a path.
            classes: Distinct class names; their order gives the ids of the label map.
            options: See :class:`Options`.

        Raises:
            DatasetError: The image cannot be sent.
            ServiceError: The endpoint's refusal, by its code, or one of the client's own codes:
                ``unreachable``, ``deadline`` (no answer in time), ``bad_reply``.
        """
        upload = await asyncio.to_thread(prepare, image)
        question = segment_question(upload, fields(classes, options))
        answer = await self.ask(question, options.get("timeout_s"))

        def read() -> Reply:
            return parse_reply(Node(parse_json(answer.body)), upload, len(classes))

        return await asyncio.to_thread(read)

    async def segment_batch(
        self, images: Iterable[ImageInput], classes: Sequence[str], **options: Unpack[Options]
    ) -> AsyncGenerator[tuple[int, Reply | LorasegError], None]:
        """Segment any number of images, a few in each request.

        Args:
            images: As for :meth:`segment`; read as they are needed.
            classes: As for :meth:`segment`.
            options: As for :meth:`segment`; ``timeout_s`` is for the next image to be finished.

        Yields:
            The index of an image and its reply or error, in the order in which they finish.

        Raises:
            ServiceError: A request was refused as a whole, or the endpoint is out of reach; images
                that were finished before have been yielded.
        """
        form = fields(classes, options)
        source = groups(images)
        while (group := await asyncio.to_thread(next, source, Group())) != Group():
            for failure in group.failures.items():
                yield failure
            batch = Batch(group.uploads, form, len(classes))
            async with aclosing(self._finish(batch, options.get("timeout_s"))) as found:
                async for settled in found:
                    yield settled

    async def adapters(self, library: str | None = None) -> tuple[AdapterInfo, ...]:
        """Return the adapters of a library, the default one if none is named, by name."""
        told = await self._get("/v1/adapters", _named(library))
        return tuple(parse_adapter(node) for node in told.nodes("adapters"))

    async def adapter(self, name: str, library: str | None = None) -> dict[str, Any]:
        """Return an adapter's card, without centroids."""
        return (await self._get(f"/v1/adapters/{quote(name, safe='')}", _named(library))).values()

    async def library(self, library: str | None = None) -> LibraryInfo:
        """Return the state of a library, the default one if none is named."""
        return parse_library(await self._get("/v1/library", _named(library)))

    async def refresh(self, library: str | None = None) -> LibraryInfo:
        """Let the endpoint look for a newer generation now. Needs the role ``admin``."""
        path = "/v1/library/refresh"
        answer = await self.ask(Question(method="POST", path=path, params=_named(library)))
        return parse_library(Node(parse_json(answer.body)))

    async def base(self) -> dict[str, Any]:
        """Return what is frozen: base model, encoder and default settings."""
        return (await self._get("/v1/base", {})).values()

    async def is_ready(self) -> bool:
        """Tell whether the endpoint can segment now; False too if it cannot be reached."""
        try:
            await self._once(Question(method="GET", path="/readyz"), self._timeout_s)
        except ServiceError as error:
            logger.debug("%s is not ready: %s", self.address.url, error)
            return False
        return True

    async def ask(self, question: Question, timeout_s: float | None = None) -> Answer:
        """Send any request until it succeeds, is refused for good, or time is over.

        Raises:
            ServiceError: As for :meth:`segment`.
        """
        patience = Patience(self._timeout_s if timeout_s is None else timeout_s)
        attempt = 0
        while True:
            try:
                return await self._once(question.within(patience.left_s), patience.left_s)
            except ServiceError as error:
                if not await self._has_waited(attempt, error, patience):
                    raise
            attempt += 1

    async def _get(self, path: str, params: Mapping[str, str]) -> Node:
        answer = await self.ask(Question(method="GET", path=path, params=params))
        return Node(parse_json(answer.body))

    async def _once(self, question: Question, left_s: float) -> Answer:
        return await exchange(self._http, self.address, question, left_s)

    async def _finish(
        self, batch: Batch, timeout_s: float | None
    ) -> AsyncGenerator[tuple[int, Reply | ServiceError], None]:
        patience = Patience(self._timeout_s if timeout_s is None else timeout_s)
        attempt = 0
        while batch.pending:
            question = batch.question().within(patience.left_s)
            lines = exchange_lines(self._http, self.address, question, patience)
            is_whole = False
            try:
                async with aclosing(lines):
                    async for line in lines:
                        settled = await asyncio.to_thread(batch.read, line)
                        if settled is not None:
                            yield settled
                            attempt = 0
                            patience.renew()
                if (refusal := batch.close()) is None:
                    return
                is_whole = True
                raise refusal
            except ServiceError as error:
                if not await self._has_waited(attempt, error, patience):
                    if is_whole:
                        break
                    raise
            attempt += 1
        for settled in batch.give_up():
            yield settled

    async def _has_waited(self, attempt: int, error: ServiceError, patience: Patience) -> bool:
        """Wait before another attempt; False at once if there should be none."""
        jitter = float(seeding.numpy_generator(time.time_ns(), "client", attempt).uniform())
        pause = pause_s(
            attempt, error, retries=self._retries, left_s=patience.left_s, jitter=jitter
        )
        if pause is None:
            return False
        logger.info("%s: %s; again in %.2f s", self.address.url, error, pause)
        await asyncio.sleep(pause)
        return True


def _named(library: str | None) -> dict[str, str]:
    return {} if library is None else {"library": library}
