"""Many images in one request: a line of JSON for each as it is done."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loraseg.serving.problems import as_service_error, problem
from loraseg.serving.work import Job, while_connected

__all__ = ["LineStream", "lines"]

logger = logging.getLogger(__name__)


class LineStream(Response):
    """NDJSON, sent as it is made; ends early when the client leaves.

    Args:
        source: The lines.
        held: Closed at the end, whatever happens.
    """

    media_type = "application/x-ndjson"

    def __init__(self, source: AsyncGenerator[bytes, None], held: ExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._held:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await while_connected(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._source) as source:
            async for line in source:
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def lines(
    jobs: Sequence[Job],
    reply: Callable[[Job], Awaitable[bytes]],
    *,
    side_by_side: int,
) -> AsyncGenerator[bytes, None]:
    """Yield a line for each job in the order in which they finish, and one with the counts.

    Closing the generator cancels what is in work. A line is held until it is taken, and a job only
    begins when one before it has been taken, so that a slow reader does not fill the memory.

    Args:
        jobs: In the order of the request.
        reply: Gives the JSON reply of a job.
        side_by_side: Jobs in work or waiting to be taken.
    """
    waiting = iter(jobs)
    working: set[asyncio.Task[tuple[bool, bytes]]] = set()
    failed = 0
    try:
        while True:
            while len(working) < side_by_side and (job := next(waiting, None)) is not None:
                working.add(asyncio.ensure_future(_line(job, reply)))
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
    yield json.dumps({"done": len(jobs) - failed, "failed": failed}).encode() + b"\n"


async def _line(job: Job, reply: Callable[[Job], Awaitable[bytes]]) -> tuple[bool, bytes]:
    try:
        return True, await reply(job) + b"\n"
    except Exception as error:
        told = as_service_error(error)
        if told.code == "internal":
            logger.error("request %s failed", job.visit.request_id, exc_info=error)
        content = {**job.names, "error": problem(told, job.visit.request_id)}
        return False, json.dumps(content).encode() + b"\n"
