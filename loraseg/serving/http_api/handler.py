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

from loraseg.data.untrusted_images import decode_image, image_size
from loraseg.errors import DatasetError, ServiceError
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import Engine
from loraseg.serving.http_api.auth import MemoryBudget, Principal
from loraseg.serving.http_api.forms import UploadedFile
from loraseg.serving.http_api.middleware import ClientDisconnectedError, RequestContext
from loraseg.serving.http_api.parameters import SegmentParameters
from loraseg.serving.http_api.responses import (
    explanation_fields,
    json_fields,
    label_map_png,
    round_milliseconds,
)
from loraseg.tensor_types import ndarray

__all__ = ["ImageHandler", "ImageRequest", "cancel_on_disconnect"]

T = TypeVar("T")

# Bytes that a pixel takes on its way: Pillow's copy, the array, turning and 16-bit grey while it is
# decoded; label map, PNG and text of the reply after it.
_BYTES_PER_PIXEL = 16
_BYTES_PER_MAP_PIXEL = 8
# Room for a few images of the largest size, or many of the usual one.
_MEMORY_BUDGET_FACTOR = 4


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image of a request.

    Attributes:
        file: PNG or JPEG.
        parameters: What is wanted of it.
        principal: Whose it is.
        context: The request.
        id_fields: First members of its JSON reply.
    """

    file: UploadedFile
    parameters: SegmentParameters
    principal: Principal
    context: RequestContext
    id_fields: Mapping[str, Any]

    @property
    def deadline(self) -> float:
        """When the answer is worthless, as ``time.time()``."""
        return self.context.arrived_at + self.parameters.timeout_s


class ImageHandler:
    """Turns jobs into replies. Used from one event loop."""

    def __init__(self, engine: Engine, config: ServiceConfig) -> None:
        self._engine = engine
        self._limits = config.limits
        self._threads = ThreadPoolExecutor(
            max(2, min(8, os.cpu_count() or 1)), thread_name_prefix="images"
        )
        self._memory = MemoryBudget(_MEMORY_BUDGET_FACTOR * _BYTES_PER_PIXEL * self._limits.pixels)

    async def json_response(self, request: ImageRequest) -> bytes:
        """Return the reply as JSON, in one line.

        Raises:
            ServiceError: ``bad_image``, ``deadline``, or what the engine says.
        """
        return await self._run_before_deadline(request, self._encode_json)

    async def png_response(self, request: ImageRequest) -> tuple[bytes, SegmentResult]:
        """Return an indexed PNG, and the outcome that it shows."""
        return await self._run_before_deadline(request, self._encode_png)

    async def _run_before_deadline(
        self,
        request: ImageRequest,
        encode: Callable[[ImageRequest, SegmentRequest, SegmentResult, dict[str, float]], T],
    ) -> T:
        clock = asyncio.timeout(request.deadline - time.time())
        try:
            async with clock, self._memory.reserve(self._memory_bytes(request)):
                return await self._run(request, encode)
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise ServiceError(
                "deadline", f"No answer within the {request.parameters.timeout_s:g} s asked for."
            ) from error

    async def _run(
        self,
        request: ImageRequest,
        encode: Callable[[ImageRequest, SegmentRequest, SegmentResult, dict[str, float]], T],
    ) -> T:
        started = time.perf_counter()
        image = await self._in_thread(self._decode, request.file)
        order = SegmentRequest(
            image=image,
            classes=request.parameters.classes.names,
            library=request.parameters.library,
            query=request.parameters.query,
            visible=request.principal.visible,
            maps=request.parameters.maps,
            tiling=request.parameters.tiling,
            deadline=request.deadline,
        )
        decode_ms = 1000 * (time.perf_counter() - started)
        outcome = await self._engine.segment(order)
        timing = {"decode": decode_ms, **outcome.timing_ms}
        return await self._in_thread(encode, request, order, outcome, timing)

    def _memory_bytes(self, request: ImageRequest) -> int:
        try:
            width, height = image_size(request.file.data)
        except DatasetError as error:
            raise ServiceError("bad_image", str(error)) from error
        pixels = min(width * height, self._limits.pixels)
        further = len(request.parameters.maps) + ("overlay" in request.parameters.returns)
        return pixels * (_BYTES_PER_PIXEL + _BYTES_PER_MAP_PIXEL * further)

    def _decode(self, file: UploadedFile) -> ndarray:
        try:
            return decode_image(file.data, max_pixels=self._limits.pixels)
        except DatasetError as error:
            raise ServiceError("bad_image", str(error)) from error

    def _encode_json(
        self,
        job: ImageRequest,
        order: SegmentRequest,
        outcome: SegmentResult,
        timing: dict[str, float],
    ) -> bytes:
        started = time.perf_counter()
        members = {**job.id_fields, **json_fields(order, job.parameters, outcome)}
        if "explanation" in job.parameters.returns:
            timing["encode"] = 1000 * (time.perf_counter() - started)
            timing["total"] = 1000 * (time.time() - job.context.arrived_at)
            members |= explanation_fields(outcome, job.parameters.library)
            members["timing_ms"] = round_milliseconds(timing)
        return json.dumps(members).encode()

    def _encode_png(
        self,
        job: ImageRequest,
        order: SegmentRequest,
        outcome: SegmentResult,
        timing: dict[str, float],
    ) -> tuple[bytes, SegmentResult]:
        del order, timing
        return label_map_png(job.parameters, outcome), outcome

    async def _in_thread(self, function: Callable[..., T], *values: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *values)


async def cancel_on_disconnect(receive: Receive, coroutine: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` as long as somebody waits for it.

    Args:
        receive: Of a request whose body has been read.
        coroutine: Cancelled when the client leaves.

    Raises:
        ClientDisconnectedError: The client has left.
    """
    working = asyncio.ensure_future(coroutine)
    watching = asyncio.ensure_future(_wait_disconnect(receive))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnectedError
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
