"""The routes that segment: one image, or several with a streamed response."""

from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response

from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import Engine
from loraseg.serving.http_api.auth import Authenticator
from loraseg.serving.http_api.forms import BodyBudget, read_submission
from loraseg.serving.http_api.handler import (
    ImageHandler,
    ImageRequest,
    cancel_on_disconnect,
    encode_json,
    encode_png,
)
from loraseg.serving.http_api.middleware import request_context
from loraseg.serving.http_api.ndjson import NdjsonResponse, stream_results
from loraseg.serving.http_api.parameters import ParameterParser
from loraseg.serving.http_api.responses import png_headers

__all__ = ["SegmentRoutes"]

_NO_STORE = {"Cache-Control": "no-store"}
# Limit of all bodies in memory, as a multiple of the largest.
_BODY_BUDGET_FACTOR = 16


class SegmentRoutes:
    """Handlers of ``/v1/segment`` and ``/v1/segment/batch``."""

    def __init__(self, engine: Engine, config: ServiceConfig, authenticator: Authenticator) -> None:
        self._limits = config.limits
        self._authenticator = authenticator
        self._parser = ParameterParser(config)
        self._handler = ImageHandler(engine, config)
        self._body_budget = BodyBudget(_BODY_BUDGET_FACTOR * config.limits.body_bytes)
        self._concurrency = 2 * config.batch

    async def segment(self, request: Request) -> Response:
        """Segment one image."""
        principal = await self._authenticator.authenticate(request, "segment")
        with self._authenticator.acquire_slot(principal), self._body_budget.reserve() as consume:
            submission = await read_submission(request, consume, "image", max_files=1)
            context = request_context(request.scope)
            image_request = ImageRequest(
                file=submission.files[0],
                parameters=self._parser.parse(submission.fields),
                visible=principal.visible,
                context=context,
                id_fields={"request_id": context.request_id},
            )
            if not _prefers_png(request.headers.get("accept", "")):
                content = await cancel_on_disconnect(
                    request.receive, self._handler.run(image_request, encode_json)
                )
                return Response(content, headers=_NO_STORE, media_type="application/json")
            png, result = await cancel_on_disconnect(
                request.receive, self._handler.run(image_request, encode_png)
            )
            headers = {**_NO_STORE, **png_headers(image_request.parameters, result)}
            return Response(png, headers=headers, media_type="image/png")

    async def segment_batch(self, request: Request) -> Response:
        """Segment several images; the response is a stream."""
        principal = await self._authenticator.authenticate(request, "segment")
        with ExitStack() as stack:
            stack.enter_context(self._authenticator.acquire_slot(principal))
            consume = stack.enter_context(self._body_budget.reserve())
            submission = await read_submission(
                request, consume, "images", max_files=self._limits.images
            )
            parameters = self._parser.parse(submission.fields)
            context = request_context(request.scope)
            image_requests = [
                ImageRequest(
                    file=file,
                    parameters=parameters,
                    visible=principal.visible,
                    context=context,
                    id_fields={"index": index, "file": file.name, "request_id": context.request_id},
                )
                for index, file in enumerate(submission.files)
            ]
            lines = stream_results(
                image_requests,
                lambda image_request: self._handler.run(image_request, encode_json),
                concurrency=self._concurrency,
            )
            # The response releases slot and memory after its last line.
            return NdjsonResponse(lines, stack.pop_all())


def _prefers_png(accept: str) -> bool:
    """Return whether ``image/png`` has at least JSON's quality (RFC 9110, section 12.5.1)."""
    qualities = {"image/png": 0.0, "application/json": 0.0}
    for item in accept[:1000].split(","):
        media_type, *options = (part.strip().lower() for part in item.split(";"))
        if media_type in qualities:
            quality = next((o[2:] for o in options if o.startswith("q=")), "1")
            qualities[media_type] = min(1.0, float(quality)) if _is_quality_value(quality) else 0.0
    return 0 < qualities["image/png"] >= qualities["application/json"]


def _is_quality_value(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal() and text.isascii()
