"""The routes that segment: one image at a time, or many as a stream."""

from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response

from loraseg.serving.admission import Admission
from loraseg.serving.batches import LineStream, lines
from loraseg.serving.bodies import BodyRoom, read_submission
from loraseg.serving.config import ServiceConfig
from loraseg.serving.guard import visit_of
from loraseg.serving.orders import Engine
from loraseg.serving.params import Asking
from loraseg.serving.replies import png_headers
from loraseg.serving.work import Job, Workshop, while_connected

__all__ = ["Desk"]

_NO_STORE = {"Cache-Control": "no-store"}
# Bodies in memory at once, as a multiple of the largest.
_LARGEST_BODIES = 16


class Desk:
    """Takes requests in and hands replies out."""

    def __init__(self, engine: Engine, config: ServiceConfig, admission: Admission) -> None:
        self._limits = config.limits
        self._admission = admission
        self._asking = Asking(config)
        self._workshop = Workshop(engine, config)
        self._room = BodyRoom(_LARGEST_BODIES * config.limits.body_bytes)
        self._side_by_side = 2 * config.batch

    async def segment(self, request: Request) -> Response:
        """Segment one image."""
        caller = await self._admission.caller(request, "segment")
        with self._admission.place(caller), self._room.shelf() as put:
            submission = await read_submission(request, put, "image", most_files=1)
            visit = visit_of(request.scope)
            job = Job(
                file=submission.files[0],
                ask=self._asking.read(submission.fields),
                caller=caller,
                visit=visit,
                names={"request_id": visit.request_id},
            )
            if not _prefers_png(request.headers.get("accept", "")):
                content = await while_connected(request.receive, self._workshop.json_reply(job))
                return Response(content, headers=_NO_STORE, media_type="application/json")
            picture, outcome = await while_connected(request.receive, self._workshop.png_reply(job))
            headers = {**_NO_STORE, **png_headers(job.ask, outcome)}
            return Response(picture, headers=headers, media_type="image/png")

    async def batch(self, request: Request) -> Response:
        """Segment several images; the reply is a stream."""
        caller = await self._admission.caller(request, "segment")
        with ExitStack() as stack:
            stack.enter_context(self._admission.place(caller))
            put = stack.enter_context(self._room.shelf())
            submission = await read_submission(
                request, put, "images", most_files=self._limits.images
            )
            ask, visit = self._asking.read(submission.fields), visit_of(request.scope)
            jobs = [
                Job(
                    file=file,
                    ask=ask,
                    caller=caller,
                    visit=visit,
                    names={"index": index, "file": file.name, "request_id": visit.request_id},
                )
                for index, file in enumerate(submission.files)
            ]
            source = lines(jobs, self._workshop.json_reply, side_by_side=self._side_by_side)
            # Place and memory are given back when the last line has been sent.
            return LineStream(source, stack.pop_all())


def _prefers_png(accept: str) -> bool:
    """Tell whether image/png is named, and no less wanted than JSON (RFC 9110, section 12.5.1)."""
    wanted = {"image/png": 0.0, "application/json": 0.0}
    for item in accept[:1000].split(","):
        kind, *options = (part.strip().lower() for part in item.split(";"))
        if kind in wanted:
            quality = next((o[2:] for o in options if o.startswith("q=")), "1")
            wanted[kind] = min(1.0, float(quality)) if _is_quality(quality) else 0.0
    return 0 < wanted["image/png"] >= wanted["application/json"]


def _is_quality(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal() and text.isascii()
