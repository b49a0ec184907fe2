"""The HTTP API of an engine, as an ASGI app."""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from loraseg.api_types import Health
from loraseg.errors import ServiceError
from loraseg.serving.config import ServiceConfig
from loraseg.serving.engine import Engine
from loraseg.serving.http_api.auth import Authenticator
from loraseg.serving.http_api.catalog_views import adapter_card, adapter_list, library_info
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
        engine: Segments the images.
        config: Libraries, limits and defaults.
        tokens: Accepted tokens; None accepts every client and closes the admin routes.
        on_complete: Called after each request, for metrics.
        send_request_id: Whether responses get X-Request-ID; False behind a proxy that adds it.
    """
    # No redirects: they would be built from the Host header, which the client controls.
    api = FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False)
    api.add_middleware(
        RequestMiddleware,
        limits=config.limits,
        on_complete=on_complete,
        send_request_id=send_request_id,
    )
    api.add_exception_handler(HTTPException, _routing_error_response)
    authenticator = Authenticator(tokens, config.limits)
    routes = SegmentRoutes(engine, config, authenticator)
    api.post("/v1/segment")(routes.segment)
    api.post("/v1/segment/batch")(routes.segment_batch)
    document = openapi_document(config)
    api.openapi = lambda: document
    _add_pages(api, document)
    _add_public_routes(api, engine)
    _add_library_routes(api, engine, config, authenticator)
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
    """Add the routes that need no token."""

    @api.get("/healthz")
    async def healthz() -> Response:
        return _json_response(Health("ok"))

    @api.get("/readyz")
    async def readyz(request: Request) -> Response:
        state = await engine.readiness()
        if state.ready:
            return _json_response(state)
        missing = ", ".join(state.waiting_for) or "the models"
        error = ServiceError("not_ready", f"Waiting for {missing}.")
        return problem_response(error, request_context(request.scope).request_id, **asdict(state))

    @api.get("/v1/examples")
    async def examples() -> Response:
        return _json_response(example_list())

    @api.get("/v1/examples/{n}.png")
    async def example(request: Request) -> Response:
        n = request.path_params["n"]
        png = await asyncio.to_thread(example_png, int(n) if re.fullmatch("[0-9]{1,3}", n) else -1)
        headers = {"Cache-Control": "public, max-age=3600"}
        return Response(png, headers=headers, media_type="image/png")


def _add_library_routes(
    api: FastAPI, engine: Engine, config: ServiceConfig, authenticator: Authenticator
) -> None:
    parser = ParameterParser(config)
    libraries = tuple(config.libraries)

    def library_of(request: Request) -> str:
        return parser.library(unique_parameters(query_fields(request), ("library",)).get("library"))

    @api.get("/v1/adapters")
    async def adapters(request: Request) -> Response:
        principal = await authenticator.authenticate(request, "segment")
        return _json_response(adapter_list(await engine.catalog(library_of(request)), principal))

    @api.get("/v1/adapters/{name}")
    async def adapter(request: Request) -> Response:
        principal = await authenticator.authenticate(request, "segment")
        name = request.path_params["name"]
        return _json_response(await adapter_card(engine, library_of(request), name, principal))

    @api.get("/v1/library")
    async def library(request: Request) -> Response:
        principal = await authenticator.authenticate(request, "segment")
        view = await engine.catalog(library_of(request))
        return _json_response(library_info(view, principal, libraries))

    @api.post("/v1/library/refresh")
    async def refresh(request: Request) -> Response:
        principal = await authenticator.authenticate(request, "admin")
        view = await engine.refresh(library_of(request))
        return _json_response(library_info(view, principal, libraries))

    @api.get("/v1/base")
    async def base(request: Request) -> Response:
        await authenticator.authenticate(request, "segment")
        unique_parameters(query_fields(request), ())
        return _json_response(await engine.base())


async def _routing_error_response(request: Request, error: Exception) -> Response:
    """Return problem details for unknown paths and methods, which the router rejects."""
    service_error = as_service_error(error)
    context = request_context(request.scope)
    context.problem_code = service_error.code
    response = problem_response(service_error, context.request_id)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _json_response(content: Any) -> Response:
    """Return a response with a dictionary or one of :mod:`loraseg.api_types`."""
    if is_dataclass(content) and not isinstance(content, type):
        content = asdict(content)
    headers = {"Cache-Control": "no-store"}
    return Response(json.dumps(content), headers=headers, media_type="application/json")
