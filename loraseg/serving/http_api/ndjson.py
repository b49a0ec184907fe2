"""The response to several images: a line of JSON for each as soon as it is segmented."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraseg.serving.http_api.handler import ImageRequest, cancel_on_disconnect
from loraseg.serving.http_api.problems import as_service_error, problem_details

__all__ = ["NdjsonResponse", "stream_results"]

logger = logging.getLogger(__name__)


class NdjsonResponse(Response):
    """Streamed NDJSON; cancelled when the client disconnects.

    Args:
        lines: The lines.
        resources: Closed after the response, also after an error.
    """

    media_type = "application/x-ndjson"

    def __init__(self, lines: AsyncGenerator[bytes, None], resources: ExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._lines = lines
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._resources:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await cancel_on_disconnect(receive, self._send_lines(send))

    async def _send_lines(self, send: Send) -> None:
        async with aclosing(self._lines) as lines:
            async for line in lines:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def stream_results(
    requests: Sequence[ImageRequest],
    respond: Callable[[ImageRequest], Awaitable[bytes]],
    *,
    concurrency: int,
) -> AsyncGenerator[bytes, None]:
    """Yield the lines of images that finished at the same time, and last a line with the counts.

    Closing the generator cancels running images. A new image starts only when the line of an
    earlier one has been consumed, so that a slow client does not fill the memory.

    Args:
        requests: In the order of the HTTP request.
        respond: Returns the JSON reply of an image.
        concurrency: Number of images that run or wait to be consumed.
    """
    remaining = iter(requests)
    running: set[asyncio.Task[tuple[bool, bytes]]] = set()
    failed = 0
    try:
        while True:
            while len(running) < concurrency and (request := next(remaining, None)) is not None:
                running.add(asyncio.ensure_future(_result_line(request, respond)))
            if not running:
                break
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running -= done
            results = [task.result() for task in done]
            failed += sum(not is_success for is_success, _ in results)
            yield b"".join(line for _, line in results)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    yield json.dumps({"done": len(requests) - failed, "failed": failed}).encode() + b"\n"


async def _result_line(
    request: ImageRequest, respond: Callable[[ImageRequest], Awaitable[bytes]]
) -> tuple[bool, bytes]:
    try:
        return True, await respond(request) + b"\n"
    except Exception as error:
        client_error = as_service_error(error)
        if client_error.code == "internal":
            logger.error("request %s failed", request.context.request_id, exc_info=error)
        problem = problem_details(client_error, request.context.request_id)
        return False, json.dumps({**request.id_fields, "error": problem}).encode() + b"\n"
