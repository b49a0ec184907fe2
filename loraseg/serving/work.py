"""One image from its bytes to its reply: coded in threads, segmented by the engine."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Receive

from loraseg.data.uploads import decode_image, image_size
from loraseg.errors import DatasetError, ServiceError
from loraseg.serving.admission import Caller, MemoryBudget
from loraseg.serving.bodies import File
from loraseg.serving.config import ServiceConfig
from loraseg.serving.guard import ClientGoneError, Visit
from loraseg.serving.orders import Engine, Order, Outcome
from loraseg.serving.params import Ask
from loraseg.serving.replies import explanation, json_members, png_of, rounded_ms
from loraseg.tensor_types import ndarray

__all__ = ["Job", "Workshop", "while_connected"]

T = TypeVar("T")

# Bytes that a pixel takes on its way: Pillow's copy, the array, turning and 16-bit grey while it is
# decoded; label map, PNG and text of the reply after it.
_BYTES_A_PIXEL = 16
_BYTES_A_MAP_PIXEL = 8
# Room for a few images of the largest size, or many of the usual one.
_LARGEST_IMAGES = 4


@dataclass(frozen=True, slots=True)
class Job:
    """One image of a request.

    Attributes:
        file: PNG or JPEG.
        ask: What is wanted of it.
        caller: Whose it is.
        visit: The request.
        names: First members of its JSON reply.
    """

    file: File
    ask: Ask
    caller: Caller
    visit: Visit
    names: Mapping[str, Any]

    @property
    def deadline(self) -> float:
        """When the answer is worthless, as ``time.time()``."""
        return self.visit.arrived + self.ask.timeout_s


class Workshop:
    """Turns jobs into replies. Used from one event loop."""

    def __init__(self, engine: Engine, config: ServiceConfig) -> None:
        self._engine = engine
        self._limits = config.limits
        self._threads = ThreadPoolExecutor(
            max(2, min(8, os.cpu_count() or 1)), thread_name_prefix="images"
        )
        self._memory = MemoryBudget(_LARGEST_IMAGES * _BYTES_A_PIXEL * self._limits.pixels)

    async def json_reply(self, job: Job) -> bytes:
        """Return the reply as JSON, in one line.

        Raises:
            ServiceError: ``bad_image``, ``deadline``, or what the engine says.
        """
        return await self._done(job, self._as_json)

    async def png_reply(self, job: Job) -> tuple[bytes, Outcome]:
        """Return an indexed PNG, and the outcome that it shows."""
        return await self._done(job, self._as_png)

    async def _done(
        self, job: Job, finish: Callable[[Job, Order, Outcome, dict[str, float]], T]
    ) -> T:
        clock = asyncio.timeout(job.deadline - time.time())
        try:
            async with clock, self._memory.hold(self._cost(job)):
                return await self._steps(job, finish)
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise ServiceError(
                "deadline", f"No answer within the {job.ask.timeout_s:g} s asked for."
            ) from error

    async def _steps(
        self, job: Job, finish: Callable[[Job, Order, Outcome, dict[str, float]], T]
    ) -> T:
        started = time.perf_counter()
        image = await self._in_thread(self._decode, job.file)
        order = Order(
            request_id=job.visit.request_id,
            image=image,
            classes=job.ask.classes.names,
            library=job.ask.library,
            wish=job.ask.wish,
            visible=job.caller.visible,
            maps=job.ask.maps,
            tiling=job.ask.tiling,
            deadline=job.deadline,
        )
        decode_ms = 1000 * (time.perf_counter() - started)
        outcome = await self._engine.segment(order)
        timing = {"decode": decode_ms, **outcome.timing_ms}
        return await self._in_thread(finish, job, order, outcome, timing)

    def _cost(self, job: Job) -> int:
        try:
            width, height = image_size(job.file.data)
        except DatasetError as error:
            raise ServiceError("bad_image", str(error)) from error
        pixels = min(width * height, self._limits.pixels)
        further = len(job.ask.maps) + ("overlay" in job.ask.returns)
        return pixels * (_BYTES_A_PIXEL + _BYTES_A_MAP_PIXEL * further)

    def _decode(self, file: File) -> ndarray:
        try:
            return decode_image(file.data, max_pixels=self._limits.pixels)
        except DatasetError as error:
            raise ServiceError("bad_image", str(error)) from error

    def _as_json(self, job: Job, order: Order, outcome: Outcome, timing: dict[str, float]) -> bytes:
        started = time.perf_counter()
        members = {**job.names, **json_members(order, job.ask, outcome)}
        if "explanation" in job.ask.returns:
            timing["encode"] = 1000 * (time.perf_counter() - started)
            timing["total"] = 1000 * (time.time() - job.visit.arrived)
            members |= explanation(outcome, job.ask.library)
            members["timing_ms"] = rounded_ms(timing)
        return json.dumps(members).encode()

    def _as_png(
        self, job: Job, order: Order, outcome: Outcome, timing: dict[str, float]
    ) -> tuple[bytes, Outcome]:
        del order, timing
        return png_of(job.ask, outcome), outcome

    async def _in_thread(self, work: Callable[..., T], *values: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *values)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` as long as somebody waits for it.

    Args:
        receive: Of a request whose body has been read.
        work: Cancelled when the client leaves.

    Raises:
        ClientGoneError: The client has left.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
