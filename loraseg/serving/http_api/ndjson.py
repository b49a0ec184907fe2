"""Many images in one request: a line of JSON for each as it is done."""

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
    """NDJSON, sent as it is made; ends early when the client leaves.

    Args:
        lines: The lines.
        resources: Closed at the end, whatever happens.
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
        async with aclosing(self._lines) as source:
            async for line in source:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def stream_results(
    requests: Sequence[ImageRequest],
    respond: Callable[[ImageRequest], Awaitable[bytes]],
    *,
    concurrency: int,
) -> AsyncGenerator[bytes, None]:
    """Yield a line for each job in the order in which they finish, and one with the counts.

    Closing the generator cancels what is in work. A line is held until it is taken, and a job only
    begins when one before it has been taken, so that a slow reader does not fill the memory.

    Args:
        requests: In the order of the request.
        respond: Gives the JSON reply of a job.
        concurrency: Jobs in work or waiting to be taken.
    """
    waiting = iter(requests)
    working: set[asyncio.Task[tuple[bool, bytes]]] = set()
    failed = 0
    try:
        while True:
            while len(working) < concurrency and (job := next(waiting, None)) is not None:
                working.add(asyncio.ensure_future(_result_line(job, respond)))
            if not working:
                break
            done, _ = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                working.discard(task)
                is_good, line = task.result()
                failed += not is_good
                yield line
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
    yield json.dumps({"done": len(requests) - failed, "failed": failed}).encode() + b"\n"


async def _result_line(
    request: ImageRequest, respond: Callable[[ImageRequest], Awaitable[bytes]]
) -> tuple[bool, bytes]:
    try:
        return True, await respond(request) + b"\n"
    except Exception as error:
        told = as_service_error(error)
        if told.code == "internal":
            logger.error("request %s failed", request.context.request_id, exc_info=error)
        content = {**request.id_fields, "error": problem_details(told, request.context.request_id)}
        return False, json.dumps(content).encode() + b"\n"
