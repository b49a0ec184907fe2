"""Decode an image, segment it with the engine and encode the reply."""

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
from loraseg.serving.http_api.auth import MemoryBudget
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

__all__ = ["ImageHandler", "ImageRequest", "cancel_on_disconnect", "encode_json", "encode_png"]

T = TypeVar("T")

# Peak memory per pixel. While decoding: Pillow's copy, the array, the rotated copy and 16-bit
# grey; after it: label map, PNG and text of the reply.
_BYTES_PER_PIXEL = 16
_BYTES_PER_MAP_PIXEL = 8
# Four images of the maximum size, or many of the usual one.
_MEMORY_BUDGET_FACTOR = 4
# Below these sizes decoding and encoding take less time than the hop to a thread. Without the hop
# the images of a batch request reach the engine together, so that they share one batch.
_MAX_INLINE_PIXELS = 128 * 128
_MAX_INLINE_BYTES = 64 * 1024
_INLINE_RETURNS = frozenset({"mask", "confidence", "entropy", "explanation"})


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One image of an HTTP request.

    Attributes:
        file: PNG or JPEG.
        parameters: Of the HTTP request.
        visible: Name patterns of the adapters that the client may use; None for all.
        context: The HTTP request.
        id_fields: First members of the image's JSON reply.
    """

    file: UploadedFile
    parameters: SegmentParameters
    visible: tuple[str, ...] | None
    context: RequestContext
    id_fields: Mapping[str, Any]

    @property
    def deadline(self) -> float:
        """The ``time.time()`` after which the client does not wait any more."""
        return self.context.arrived_at + self.parameters.timeout_s

    def segment_request(self, image: ndarray) -> SegmentRequest:
        """Return the engine's request for the decoded image, uint8 (h, w, 3)."""
        return SegmentRequest(
            image=image,
            classes=self.parameters.classes.names,
            library=self.parameters.library,
            query=self.parameters.query,
            visible=self.visible,
            maps=self.parameters.maps,
            tiling=self.parameters.tiling,
            deadline=self.deadline,
        )


Encode = Callable[[ImageRequest, ndarray, SegmentResult, dict[str, float]], T]


class ImageHandler:
    """Processes the images of requests. Used from one event loop."""

    def __init__(self, engine: Engine, config: ServiceConfig) -> None:
        self._engine = engine
        self._limits = config.limits
        self._threads = ThreadPoolExecutor(
            max(2, min(8, os.cpu_count() or 1)), thread_name_prefix="images"
        )
        self._memory = MemoryBudget(_MEMORY_BUDGET_FACTOR * _BYTES_PER_PIXEL * self._limits.pixels)

    async def run(self, request: ImageRequest, encode: Encode[T]) -> T:
        """Segment an image and encode the reply.

        Args:
            request: The image.
            encode: :func:`encode_json` or :func:`encode_png`; may run in a thread.

        Raises:
            ServiceError: ``bad_image``, ``deadline``, or an error of the engine.
        """
        timeout = asyncio.timeout(request.deadline - time.time())
        try:
            async with timeout:
                pixels = self._count_pixels(request.file)
                async with self._memory.reserve(_memory_bytes(pixels, request.parameters)):
                    return await self._run(request, encode, is_small=_is_small(request, pixels))
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise ServiceError(
                "deadline", f"No result within the timeout of {request.parameters.timeout_s:g} s."
            ) from error

    async def _run(self, request: ImageRequest, encode: Encode[T], *, is_small: bool) -> T:
        started = time.perf_counter()
        image = await self._call(self._decode, request.file, inline=is_small)
        decode_ms = 1000 * (time.perf_counter() - started)
        result = await self._engine.segment(request.segment_request(image))
        timing = {"decode": decode_ms, **result.timing_ms}
        inline = is_small and request.parameters.returns <= _INLINE_RETURNS
        return await self._call(encode, request, image, result, timing, inline=inline)

    def _count_pixels(self, file: UploadedFile) -> int:
        try:
            width, height = image_size(file.data)
        except DatasetError as error:
            raise ServiceError("bad_image", str(error)) from error
        return min(width * height, self._limits.pixels)

    def _decode(self, file: UploadedFile) -> ndarray:
        try:
            return decode_image(file.data, max_pixels=self._limits.pixels)
        except DatasetError as error:
            raise ServiceError("bad_image", str(error)) from error

    async def _call(self, function: Callable[..., T], *values: Any, inline: bool) -> T:
        """Call a function, in a thread unless ``inline``."""
        if inline:
            return function(*values)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *values)


def encode_json(
    request: ImageRequest, image: ndarray, result: SegmentResult, timing: dict[str, float]
) -> bytes:
    """Return the JSON reply of an image, in one line.

    Raises:
        ServiceError: ``invalid``: as :func:`~loraseg.serving.http_api.responses.json_fields`.
    """
    started = time.perf_counter()
    fields = {**request.id_fields, **json_fields(image, request.parameters, result)}
    if "explanation" in request.parameters.returns:
        timing["encode"] = 1000 * (time.perf_counter() - started)
        timing["total"] = 1000 * (time.time() - request.context.arrived_at)
        fields |= explanation_fields(result, request.parameters.library)
        fields["timing_ms"] = round_milliseconds(timing)
    return json.dumps(fields).encode()


def encode_png(
    request: ImageRequest, image: ndarray, result: SegmentResult, timing: dict[str, float]
) -> tuple[bytes, SegmentResult]:
    """Return the label map as an indexed PNG, and the result for the headers."""
    del image, timing
    return label_map_png(request.parameters, result), result


def _memory_bytes(pixels: int, parameters: SegmentParameters) -> int:
    map_count = len(parameters.maps) + ("overlay" in parameters.returns)
    return pixels * (_BYTES_PER_PIXEL + _BYTES_PER_MAP_PIXEL * map_count)


def _is_small(request: ImageRequest, pixels: int) -> bool:
    return pixels <= _MAX_INLINE_PIXELS and len(request.file.data) <= _MAX_INLINE_BYTES


async def cancel_on_disconnect(receive: Receive, coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine and cancel it if the client disconnects.

    Args:
        receive: Of an ASGI request whose body has been read.
        coroutine: The work for the client.

    Raises:
        ClientDisconnectedError: The client disconnected.
    """
    work = asyncio.ensure_future(coroutine)
    disconnect = asyncio.ensure_future(_wait_disconnect(receive))
    try:
        await asyncio.wait([work, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnectedError
    finally:
        for task in (work, disconnect):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
