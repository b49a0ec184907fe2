"""The routes that segment: one image at a time, or many as a stream."""

from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response

from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import Engine
from loraseg.serving.http_api.auth import Authenticator
from loraseg.serving.http_api.forms import BodyBudget, read_submission
from loraseg.serving.http_api.handler import ImageHandler, ImageRequest, cancel_on_disconnect
from loraseg.serving.http_api.middleware import request_context
from loraseg.serving.http_api.ndjson import NdjsonResponse, stream_results
from loraseg.serving.http_api.parameters import ParameterParser
from loraseg.serving.http_api.responses import png_headers

__all__ = ["SegmentRoutes"]

_NO_STORE = {"Cache-Control": "no-store"}
# Bodies in memory at once, as a multiple of the largest.
_BODY_BUDGET_FACTOR = 16


class SegmentRoutes:
    """Takes requests in and hands replies out."""

    def __init__(self, engine: Engine, config: ServiceConfig, authenticator: Authenticator) -> None:
        self._limits = config.limits
        self._authenticator = authenticator
        self._parser = ParameterParser(config)
        self._handler = ImageHandler(engine, config)
        self._body_budget = BodyBudget(_BODY_BUDGET_FACTOR * config.limits.body_bytes)
        self._concurrency = 2 * config.batch

    async def segment(self, request: Request) -> Response:
        """Segment one image."""
        caller = await self._authenticator.authenticate(request, "segment")
        with self._authenticator.acquire_slot(caller), self._body_budget.reserve() as put:
            submission = await read_submission(request, put, "image", max_files=1)
            visit = request_context(request.scope)
            job = ImageRequest(
                file=submission.files[0],
                parameters=self._parser.parse(submission.fields),
                principal=caller,
                context=visit,
                id_fields={"request_id": visit.request_id},
            )
            if not _prefers_png(request.headers.get("accept", "")):
                content = await cancel_on_disconnect(
                    request.receive, self._handler.json_response(job)
                )
                return Response(content, headers=_NO_STORE, media_type="application/json")
            picture, outcome = await cancel_on_disconnect(
                request.receive, self._handler.png_response(job)
            )
            headers = {**_NO_STORE, **png_headers(job.parameters, outcome)}
            return Response(picture, headers=headers, media_type="image/png")

    async def segment_batch(self, request: Request) -> Response:
        """Segment several images; the reply is a stream."""
        caller = await self._authenticator.authenticate(request, "segment")
        with ExitStack() as stack:
            stack.enter_context(self._authenticator.acquire_slot(caller))
            put = stack.enter_context(self._body_budget.reserve())
            submission = await read_submission(
                request, put, "images", max_files=self._limits.images
            )
            ask, visit = self._parser.parse(submission.fields), request_context(request.scope)
            jobs = [
                ImageRequest(
                    file=file,
                    parameters=ask,
                    principal=caller,
                    context=visit,
                    id_fields={"index": index, "file": file.name, "request_id": visit.request_id},
                )
                for index, file in enumerate(submission.files)
            ]
            source = stream_results(
                jobs, self._handler.json_response, concurrency=self._concurrency
            )
            # Place and memory are given back when the last line has been sent.
            return NdjsonResponse(source, stack.pop_all())


def _prefers_png(accept: str) -> bool:
    """Tell whether image/png is named, and no less wanted than JSON (RFC 9110, section 12.5.1)."""
    wanted = {"image/png": 0.0, "application/json": 0.0}
    for item in accept[:1000].split(","):
        kind, *options = (part.strip().lower() for part in item.split(";"))
        if kind in wanted:
            quality = next((o[2:] for o in options if o.startswith("q=")), "1")
            wanted[kind] = min(1.0, float(quality)) if _is_quality_value(quality) else 0.0
    return 0 < wanted["image/png"] >= wanted["application/json"]


def _is_quality_value(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal() and text.isascii()
