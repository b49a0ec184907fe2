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
from loraseg.client.batches import PendingBatch, UploadGroup, group_uploads
from loraseg.client.endpoint import parse_endpoint
from loraseg.client.images import ImageInput, prepare_upload
from loraseg.client.parsing import (
    JsonObject,
    parse_adapter,
    parse_json,
    parse_library,
    parse_segment_response,
)
from loraseg.client.requests import Request, SegmentOptions, form_fields, segment_request
from loraseg.client.responses import AdapterInfo, LibraryInfo, SegmentResponse
from loraseg.client.retry import Deadline, retry_delay_s
from loraseg.client.transport import Response, connect, send, stream_lines
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
        self.endpoint = parse_endpoint(url, token, allow_insecure=allow_insecure)
        self._timeout_s = timeout_s
        self._retries = retries
        self._http = connect(self.endpoint, token)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint.url!r})"

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
        self, image: ImageInput, classes: Sequence[str], **options: Unpack[SegmentOptions]
    ) -> SegmentResponse:
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
        upload = await asyncio.to_thread(prepare_upload, image)
        question = segment_request(upload, form_fields(classes, options))
        answer = await self.request(question, options.get("timeout_s"))

        def read() -> SegmentResponse:
            return parse_segment_response(JsonObject(parse_json(answer.body)), upload, len(classes))

        return await asyncio.to_thread(read)

    async def segment_batch(
        self,
        images: Iterable[ImageInput],
        classes: Sequence[str],
        **options: Unpack[SegmentOptions],
    ) -> AsyncGenerator[tuple[int, SegmentResponse | LorasegError], None]:
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
        form = form_fields(classes, options)
        source = group_uploads(images)
        while (group := await asyncio.to_thread(next, source, UploadGroup())) != UploadGroup():
            for failure in group.failures.items():
                yield failure
            batch = PendingBatch(group.uploads, form, len(classes))
            async with aclosing(self._stream_batch(batch, options.get("timeout_s"))) as found:
                async for settled in found:
                    yield settled

    async def adapters(self, library: str | None = None) -> tuple[AdapterInfo, ...]:
        """Return the adapters of a library, the default one if none is named, by name."""
        told = await self._get_json("/v1/adapters", _library_params(library))
        return tuple(parse_adapter(node) for node in told.children("adapters"))

    async def adapter(self, name: str, library: str | None = None) -> dict[str, Any]:
        """Return an adapter's card, without centroids."""
        return (
            await self._get_json(f"/v1/adapters/{quote(name, safe='')}", _library_params(library))
        ).to_dict()

    async def library(self, library: str | None = None) -> LibraryInfo:
        """Return the state of a library, the default one if none is named."""
        return parse_library(await self._get_json("/v1/library", _library_params(library)))

    async def refresh(self, library: str | None = None) -> LibraryInfo:
        """Let the endpoint look for a newer generation now. Needs the role ``admin``."""
        path = "/v1/library/refresh"
        answer = await self.request(
            Request(method="POST", path=path, params=_library_params(library))
        )
        return parse_library(JsonObject(parse_json(answer.body)))

    async def base(self) -> dict[str, Any]:
        """Return what is frozen: base model, encoder and default settings."""
        return (await self._get_json("/v1/base", {})).to_dict()

    async def is_ready(self) -> bool:
        """Tell whether the endpoint can segment now; False too if it cannot be reached."""
        try:
            await self._send_once(Request(method="GET", path="/readyz"), self._timeout_s)
        except ServiceError as error:
            logger.debug("%s is not ready: %s", self.endpoint.url, error)
            return False
        return True

    async def request(self, request: Request, timeout_s: float | None = None) -> Response:
        """Send any request until it succeeds, is refused for good, or time is over.

        Raises:
            ServiceError: As for :meth:`segment`.
        """
        patience = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        attempt = 0
        while True:
            try:
                return await self._send_once(
                    request.with_timeout(patience.remaining_s), patience.remaining_s
                )
            except ServiceError as error:
                if not await self._wait_to_retry(attempt, error, patience):
                    raise
            attempt += 1

    async def _get_json(self, path: str, params: Mapping[str, str]) -> JsonObject:
        answer = await self.request(Request(method="GET", path=path, params=params))
        return JsonObject(parse_json(answer.body))

    async def _send_once(self, request: Request, timeout_s: float) -> Response:
        return await send(self._http, self.endpoint, request, timeout_s)

    async def _stream_batch(
        self, batch: PendingBatch, timeout_s: float | None
    ) -> AsyncGenerator[tuple[int, SegmentResponse | ServiceError], None]:
        patience = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        attempt = 0
        while batch.pending:
            question = batch.next_request().with_timeout(patience.remaining_s)
            lines = stream_lines(self._http, self.endpoint, question, patience)
            is_whole = False
            try:
                async with aclosing(lines):
                    async for line in lines:
                        settled = await asyncio.to_thread(batch.parse_line, line)
                        if settled is not None:
                            yield settled
                            attempt = 0
                            patience.reset()
                if (refusal := batch.retry_reason()) is None:
                    return
                is_whole = True
                raise refusal
            except ServiceError as error:
                if not await self._wait_to_retry(attempt, error, patience):
                    if is_whole:
                        break
                    raise
            attempt += 1
        for settled in batch.remaining_errors():
            yield settled

    async def _wait_to_retry(self, attempt: int, error: ServiceError, deadline: Deadline) -> bool:
        """Wait before another attempt; False at once if there should be none."""
        jitter = float(seeding.numpy_generator(time.time_ns(), "client", attempt).uniform())
        pause = retry_delay_s(
            attempt, error, retries=self._retries, remaining_s=deadline.remaining_s, jitter=jitter
        )
        if pause is None:
            return False
        logger.info("%s: %s; again in %.2f s", self.endpoint.url, error, pause)
        await asyncio.sleep(pause)
        return True


def _library_params(library: str | None) -> dict[str, str]:
    return {} if library is None else {"library": library}
