"""The client for asyncio; :class:`loraseg.client.Client` wraps it for synchronous code."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Unpack
from urllib.parse import quote

from loraseg import seeding
from loraseg.api_types import AdapterInfo, AdapterList, LibraryInfo
from loraseg.client.batches import PendingBatch, UploadGroup, group_uploads
from loraseg.client.endpoint import parse_endpoint
from loraseg.client.images import ImageInput, prepare_upload
from loraseg.client.parsing import parse, parse_object, parse_segment_response
from loraseg.client.requests import Request, SegmentOptions, form_fields, segment_request
from loraseg.client.responses import SegmentResponse
from loraseg.client.retry import Deadline, retry_delay_s
from loraseg.client.transport import Response, connect, send, stream_lines
from loraseg.errors import ConfigError, LorasegError, ServiceError

__all__ = ["AsyncClient"]

logger = logging.getLogger(__name__)


class AsyncClient:
    """Client of an endpoint. Calls may run concurrently.

    Args:
        url: ``https://host[:port][/path]``.
        token: Bearer token. It is sent to this endpoint only and appears in no message.
        timeout_s: Limit of a call with all its attempts.
        retries: Maximum number of further attempts after 429, 503 and broken connections.
        allow_insecure: Send the token over plain HTTP to another machine.

    Raises:
        ConfigError: The URL, the token or a number is invalid; or the token would be sent
            unencrypted to another machine.
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
            options: See :class:`SegmentOptions`.

        Raises:
            DatasetError: The image is not RGB, cannot be read or is too large.
            ServiceError: The endpoint's error with its code, or one of the client's own codes:
                ``unreachable``, ``deadline`` (no response in time), ``bad_reply``.
        """
        upload = await asyncio.to_thread(prepare_upload, image)
        request = segment_request(upload, form_fields(classes, options))
        response = await self.request(request, options.get("timeout_s"))
        return await asyncio.to_thread(parse_segment_response, response.body, upload, len(classes))

    async def segment_batch(
        self,
        images: Iterable[ImageInput],
        classes: Sequence[str],
        **options: Unpack[SegmentOptions],
    ) -> AsyncGenerator[tuple[int, SegmentResponse | LorasegError], None]:
        """Segment any number of images, several per request.

        Args:
            images: As for :meth:`segment`; read lazily.
            classes: As for :meth:`segment`.
            options: As for :meth:`segment`; ``timeout_s`` limits the time between two results.

        Yields:
            The index of an image and its response or error, in the order of completion.

        Raises:
            ServiceError: A whole request failed, or the endpoint cannot be reached; results that
                arrived before have been yielded.
        """
        form = form_fields(classes, options)
        source = group_uploads(images)
        while (group := await asyncio.to_thread(next, source, UploadGroup())) != UploadGroup():
            for failure in group.failures.items():
                yield failure
            batch = PendingBatch(group.uploads, form, len(classes))
            async with aclosing(self._stream_batch(batch, options.get("timeout_s"))) as results:
                async for result in results:
                    yield result

    async def adapters(self, library: str | None = None) -> tuple[AdapterInfo, ...]:
        """Return the adapters of a library (None: the default one), ordered by name."""
        body = await self._get("/v1/adapters", _library_params(library))
        return parse(body, AdapterList).adapters

    async def adapter(self, name: str, library: str | None = None) -> dict[str, Any]:
        """Return an adapter's card, without centroids."""
        path = f"/v1/adapters/{quote(name, safe='')}"
        return parse_object(await self._get(path, _library_params(library)))

    async def library(self, library: str | None = None) -> LibraryInfo:
        """Return the state of a library (None: the default one)."""
        return parse(await self._get("/v1/library", _library_params(library)), LibraryInfo)

    async def refresh(self, library: str | None = None) -> LibraryInfo:
        """Make the endpoint check for a newer generation now. Requires the role ``admin``."""
        params = _library_params(library)
        response = await self.request(
            Request(method="POST", path="/v1/library/refresh", params=params)
        )
        return parse(response.body, LibraryInfo)

    async def base(self) -> dict[str, Any]:
        """Return the description of base model, encoder and default settings."""
        return parse_object(await self._get("/v1/base", {}))

    async def is_ready(self) -> bool:
        """Return whether the endpoint can segment now; False if it cannot be reached."""
        try:
            await self._send_once(Request(method="GET", path="/readyz"), self._timeout_s)
        except ServiceError as error:
            logger.debug("%s is not ready: %s", self.endpoint.url, error)
            return False
        return True

    async def request(self, request: Request, timeout_s: float | None = None) -> Response:
        """Send a request; retry until success, a permanent error or the deadline.

        Raises:
            ServiceError: As for :meth:`segment`.
        """
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        attempt = 0
        while True:
            try:
                return await self._send_once(
                    request.with_timeout(deadline.remaining_s), deadline.remaining_s
                )
            except ServiceError as error:
                if not await self._wait_to_retry(attempt, error, deadline):
                    raise
            attempt += 1

    async def _get(self, path: str, params: Mapping[str, str]) -> bytes:
        return (await self.request(Request(method="GET", path=path, params=params))).body

    async def _send_once(self, request: Request, timeout_s: float) -> Response:
        return await send(self._http, self.endpoint, request, timeout_s)

    async def _stream_batch(
        self, batch: PendingBatch, timeout_s: float | None
    ) -> AsyncGenerator[tuple[int, SegmentResponse | ServiceError], None]:
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        attempt = 0
        while batch.pending:
            request = batch.next_request().with_timeout(deadline.remaining_s)
            lines = stream_lines(self._http, self.endpoint, request, deadline)
            is_complete = False
            try:
                async with aclosing(lines):
                    async for line in lines:
                        result = await asyncio.to_thread(batch.parse_line, line)
                        if result is not None:
                            yield result
                            attempt = 0
                            deadline.reset()
                if (retryable := batch.retry_reason()) is None:
                    return
                is_complete = True
                raise retryable
            except ServiceError as error:
                if not await self._wait_to_retry(attempt, error, deadline):
                    if is_complete:
                        break
                    raise
            attempt += 1
        for result in batch.remaining_errors():
            yield result

    async def _wait_to_retry(self, attempt: int, error: ServiceError, deadline: Deadline) -> bool:
        """Sleep before the next attempt; return False at once if there is none."""
        jitter = float(seeding.numpy_generator(time.time_ns(), "client", attempt).uniform())
        delay_s = retry_delay_s(
            attempt, error, retries=self._retries, remaining_s=deadline.remaining_s, jitter=jitter
        )
        if delay_s is None:
            return False
        logger.info("%s: %s; retry in %.2f s", self.endpoint.url, error, delay_s)
        await asyncio.sleep(delay_s)
        return True


def _library_params(library: str | None) -> dict[str, str]:
    return {} if library is None else {"library": library}
