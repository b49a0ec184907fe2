"""The HTTP API over an engine: an ASGI app that needs nothing but the engine."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loraseg.errors import ServiceError
from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import Engine
from loraseg.serving.http_api.auth import Authenticator
from loraseg.serving.http_api.catalog_views import adapter_card, adapter_list, library_state
from loraseg.serving.http_api.examples import example_list, example_png
from loraseg.serving.http_api.forms import query_fields
from loraseg.serving.http_api.middleware import RequestContext, RequestMiddleware, request_context
from loraseg.serving.http_api.openapi import openapi_document
from loraseg.serving.http_api.pages import docs_page, index_page
from loraseg.serving.http_api.parameters import ParameterParser, unique_parameters
from loraseg.serving.http_api.problems import as_service_error, problem_response
from loraseg.serving.http_api.routes import SegmentRoutes
from loraseg.serving.tokens import TokenStore

__all__ = ["build_api"]


def build_api(
    engine: Engine,
    config: ServiceConfig,
    *,
    tokens: TokenStore | None = None,
    on_complete: Callable[[RequestContext], None] | None = None,
    send_request_id: bool = True,
) -> FastAPI:
    """Build the API.

    Args:
        engine: Whatever segments.
        config: Libraries, limits and defaults.
        tokens: Who may use it; without one everybody may, and the admin routes are closed.
        on_complete: Told about each request when it is over, for metrics.
        send_request_id: Whether answers get X-Request-ID; False behind a proxy that writes it.
    """
    # No redirects: they would be built from the Host header, which is the client's text.
    api = FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False)
    api.add_middleware(
        RequestMiddleware,
        limits=config.limits,
        on_complete=on_complete,
        send_request_id=send_request_id,
    )
    api.add_exception_handler(HTTPException, _routing_error_response)
    admission = Authenticator(tokens, config.limits)
    desk = SegmentRoutes(engine, config, admission)
    api.post("/v1/segment")(desk.segment)
    api.post("/v1/segment/batch")(desk.segment_batch)
    document = openapi_document(config)
    api.openapi = lambda: document
    _add_pages(api, document)
    _add_public_routes(api, engine)
    _add_library_routes(api, engine, config, admission)
    return api


def _add_pages(api: FastAPI, document: dict[str, Any]) -> None:
    @api.get("/")
    async def index() -> Response:
        content, headers = index_page()
        return Response(content, headers=headers, media_type="text/html")

    @api.get("/docs")
    async def documentation() -> Response:
        content, headers = docs_page(document)
        return Response(content, headers=headers, media_type="text/html")


def _add_public_routes(api: FastAPI, engine: Engine) -> None:
    """Add what needs no token."""

    @api.get("/healthz")
    async def healthz() -> Response:
        return _json_response({"status": "ok"})

    @api.get("/readyz")
    async def readyz(request: Request) -> Response:
        state = await engine.readiness()
        waiting_for = list(state.waiting_for)
        if state.ready:
            return _json_response({"ready": True, "waiting_for": waiting_for})
        error = ServiceError("not_ready", f"Waiting for {', '.join(waiting_for) or 'the models'}.")
        visit = request_context(request.scope)
        return problem_response(error, visit.request_id, ready=False, waiting_for=waiting_for)

    @api.get("/v1/examples")
    async def examples() -> Response:
        return _json_response({"examples": example_list()})

    @api.get("/v1/examples/{n}.png")
    async def example(request: Request) -> Response:
        n = request.path_params["n"]
        picture = await asyncio.to_thread(
            example_png, int(n) if re.fullmatch("[0-9]{1,3}", n) else -1
        )
        headers = {"Cache-Control": "public, max-age=3600"}
        return Response(picture, headers=headers, media_type="image/png")


def _add_library_routes(
    api: FastAPI, engine: Engine, config: ServiceConfig, admission: Authenticator
) -> None:
    asking = ParameterParser(config)
    libraries = tuple(config.libraries)

    def library_of(request: Request) -> str:
        return asking.library(unique_parameters(query_fields(request), ("library",)).get("library"))

    @api.get("/v1/adapters")
    async def adapters(request: Request) -> Response:
        caller = await admission.authenticate(request, "segment")
        return _json_response(adapter_list(await engine.catalog(library_of(request)), caller))

    @api.get("/v1/adapters/{name}")
    async def adapter(request: Request) -> Response:
        caller = await admission.authenticate(request, "segment")
        name = request.path_params["name"]
        return _json_response(await adapter_card(engine, library_of(request), name, caller))

    @api.get("/v1/library")
    async def library(request: Request) -> Response:
        caller = await admission.authenticate(request, "segment")
        return _json_response(
            library_state(await engine.catalog(library_of(request)), caller, libraries)
        )

    @api.post("/v1/library/refresh")
    async def refresh(request: Request) -> Response:
        caller = await admission.authenticate(request, "admin")
        return _json_response(
            library_state(await engine.refresh(library_of(request)), caller, libraries)
        )

    @api.get("/v1/base")
    async def base(request: Request) -> Response:
        await admission.authenticate(request, "segment")
        unique_parameters(query_fields(request), ())
        return _json_response(await engine.base())


async def _routing_error_response(request: Request, error: Exception) -> Response:
    """Word what the router refuses: unknown paths and methods."""
    told = as_service_error(error)
    visit = request_context(request.scope)
    visit.problem_code = told.code
    response = problem_response(told, visit.request_id)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _json_response(content: dict[str, Any]) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(json.dumps(content), headers=headers, media_type="application/json")
