"""The OpenAPI document: hand-written operations, since the API parses requests itself."""

from collections.abc import Sequence
from typing import Any

from loraseg.serving.config import ServiceConfig
from loraseg.serving.http_api.forms import RAW_TYPES
from loraseg.serving.http_api.parameters import (
    MAX_TOP_K,
    MODES,
    RETURNS,
    TEMPERATURE_RANGE,
    TILINGS,
)
from loraseg.serving.http_api.problems import MEDIA_TYPE, PROBLEM_TYPES
from loraseg.serving.http_api.schemas import SCHEMAS, ref

__all__ = ["openapi_document"]

_DESCRIPTION = """\
Segment an image into any list of classes. The reply has the label map and the adapters of the
library that were fused for the image, with their weights and distances."""
_ADAPTER_NAME = "^[a-z0-9][a-z0-9._-]{0,127}$"
_REQUEST_ID_HEADER = {
    "X-Request-ID": {
        "description": "The request's own if it matches [A-Za-z0-9._-]{1,64}, else a new one.",
        "schema": {"type": "string"},
    }
}
_RETRY_AFTER_HEADER = {
    "Retry-After": {
        "description": "Seconds.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}
# Errors of all routes, of routes with a token, and of routes with a library.
_COMMON_CODES = ("bad_request", "invalid", "body_timeout", "body_too_large", "internal")
_TOKEN_CODES = (*_COMMON_CODES, "unauthorized", "forbidden")
_LIBRARY_CODES = (*_TOKEN_CODES, "no_such_library", "not_ready", "draining")
_SEGMENT_CODES = (
    *(*_LIBRARY_CODES, "no_such_adapter", "unsupported_media_type", "bad_image"),
    *("too_many_requests", "overloaded", "replica_lost", "adapters_unavailable", "deadline"),
)


def openapi_document(config: ServiceConfig) -> dict[str, Any]:
    """Return the document of one service, with its libraries, limits and defaults."""
    parameters = _parameter_schemas(config)
    library = [_query_parameter("library", parameters["library"])]
    return {
        "openapi": "3.1.0",
        "info": {"title": "loraseg", "version": "1", "description": _DESCRIPTION},
        "paths": {
            "/v1/segment": {"post": _segment_operation(config, parameters)},
            "/v1/segment/batch": {"post": _batch_operation(config, parameters)},
            "/v1/adapters": {
                "get": _get_operation(
                    "adapters", "The adapters of a library", "AdapterList", library
                )
            },
            "/v1/adapters/{name}": {
                "get": _get_operation(
                    "adapter",
                    "An adapter's card",
                    "Card",
                    [_adapter_name_parameter(), *library],
                    codes=(*_LIBRARY_CODES, "no_such_adapter"),
                )
            },
            "/v1/library": {
                "get": _get_operation("library", "The state of a library", "Library", library)
            },
            "/v1/library/refresh": {
                "post": _get_operation(
                    "refresh", "Check for a newer generation now (role admin)", "Library", library
                )
            },
            "/v1/base": {
                "get": _get_operation(
                    "base", "Base model and encoder", "Base", [], codes=(*_TOKEN_CODES, "not_ready")
                )
            },
            "/v1/examples": {"get": _public_operation("examples", "Example images", "Examples")},
            "/v1/examples/{n}.png": {"get": _example_operation()},
            "/healthz": {"get": _public_operation("healthz", "Whether the process runs", "Health")},
            "/readyz": {
                "get": _public_operation(
                    "readyz",
                    "Whether models and catalogs are loaded",
                    "Readiness",
                    codes=(*_COMMON_CODES, "not_ready"),
                )
            },
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _parameter_schemas(config: ServiceConfig) -> dict[str, dict[str, Any]]:
    limits, libraries = config.limits, list(config.libraries)
    return {
        "classes": {
            "type": "string",
            "minLength": 1,
            "description": "Comma-separated names, or a JSON array of strings; repeated parameters "
            f"are joined. At most {limits.classes} of at most {limits.class_name_chars} characters,"
            " distinct regardless of case and spaces. Their order gives the ids.",
            "examples": ["road, car, sky", '["road", "traffic light"]'],
        },
        "library": {"type": "string", "enum": libraries, "default": libraries[0]},
        "top_k": {
            "type": "integer",
            "minimum": 1,
            "maximum": MAX_TOP_K,
            "description": "Number of nearest adapters to fuse.",
        },
        "temperature": {
            "type": "number",
            "minimum": TEMPERATURE_RANGE[0],
            "maximum": TEMPERATURE_RANGE[1],
            "description": "Of the mixing weights; smaller values favour the nearest adapter.",
        },
        "adapters": {
            "type": "string",
            "description": "Comma-separated names: `rain` restricts the mix to the adapters so "
            "named, at any distance; `-rain` excludes one. No effect with mode=base.",
        },
        "mode": {
            "type": "string",
            "enum": list(MODES),
            "default": MODES[0],
            "description": "The nearest adapters, none, or all with equal weights.",
        },
        "return": {
            "type": "string",
            "pattern": "^ *({0}) *(, *({0}) *)*$".format("|".join(RETURNS)),
            "default": "mask,explanation",
            "description": f"Comma-separated: {', '.join(RETURNS)}.",
        },
        "tiling": {
            "type": "string",
            "enum": list(TILINGS),
            "default": TILINGS[0],
            "description": "Whether to cut the image into overlapping tiles; auto: by its size.",
        },
        "timeout_s": {
            "type": "number",
            "minimum": 0.001,
            "description": "Time limit from the arrival of the request, at most "
            f"{limits.request_timeout_s:g} s.",
        },
        "opacity": {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "default": 0.55,
            "description": "Of the overlay's colours.",
        },
    }


def _segment_operation(config: ServiceConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    raw = {"schema": {"type": "string", "format": "binary"}}
    headers = {
        name: {"description": text, "schema": {"type": "string"}}
        for name, text in (
            (
                "X-Loraseg-Classes",
                "JSON array. Each header is absent if it is over 4096 characters.",
            ),
            ("X-Loraseg-Adapters", "JSON array, as `adapters` of the JSON reply."),
            ("X-Loraseg-Mode", "As `mode`."),
            ("X-Loraseg-Generation", "As `generation`."),
            ("X-Loraseg-Fallback", "JSON text, as `fallback`."),
        )
    }
    return {
        **_operation("segment", "Segment one image"),
        "description": "With `Accept: image/png` the response is only the label map, as an indexed "
        "PNG with the classes' colours. Parameters are in the query or in the form. At most "
        f"{config.limits.pixels} pixels and {config.limits.body_bytes} bytes.",
        "parameters": [_query_parameter(name, schema) for name, schema in parameters.items()],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": _form_schema(parameters, "image", {}),
                **dict.fromkeys(RAW_TYPES, raw),
            },
        },
        "responses": {
            "200": {
                "description": "The label map, and how it was computed.",
                "headers": {**_REQUEST_ID_HEADER, **headers},
                "content": {
                    "application/json": {"schema": ref("Reply")},
                    "image/png": raw,
                },
            },
            **_problem_responses(_SEGMENT_CODES),
        },
    }


def _batch_operation(config: ServiceConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    array = {"type": "array", "minItems": 1, "maxItems": config.limits.images}
    return {
        **_operation("segment_batch", "Segment several images; results are streamed"),
        "description": "A line of JSON for each image in the order of completion: `index`, `file`, "
        "and the reply of /v1/segment, or `error` with problem details. The last line has the "
        "counts `done` and `failed`; without it, the stream is incomplete.",
        "parameters": [_query_parameter(name, schema) for name, schema in parameters.items()],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": _form_schema(parameters, "images", array)},
        },
        "responses": {
            "200": {
                "description": "Newline-delimited JSON.",
                "headers": _REQUEST_ID_HEADER,
                "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
            },
            **_problem_responses(_SEGMENT_CODES),
        },
    }


def _form_schema(parameters: dict[str, Any], field: str, array: dict[str, Any]) -> dict[str, Any]:
    file: dict[str, Any] = {"type": "string", "format": "binary"}
    return {
        "schema": {
            "type": "object",
            "properties": {field: {**array, "items": file} if array else file, **parameters},
            "required": [field],
        },
        "encoding": {field: {"contentType": "image/png, image/jpeg"}},
    }


def _get_operation(
    name: str,
    summary: str,
    schema: str,
    parameters: list[dict[str, Any]],
    *,
    codes: Sequence[str] = _LIBRARY_CODES,
) -> dict[str, Any]:
    return {
        **_operation(name, summary),
        "parameters": parameters,
        "responses": {"200": _success_response(schema), **_problem_responses(codes)},
    }


def _public_operation(
    name: str, summary: str, schema: str, *, codes: Sequence[str] = _COMMON_CODES
) -> dict[str, Any]:
    responses = {"200": _success_response(schema), **_problem_responses(codes)}
    return {"operationId": name, "summary": summary, "security": [], "responses": responses}


def _example_operation() -> dict[str, Any]:
    number = {"name": "n", "in": "path", "required": True, "schema": {"type": "integer"}}
    png = {
        "description": "A scene of the miniature world.",
        "headers": _REQUEST_ID_HEADER,
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    }
    return {
        "operationId": "example",
        "summary": "An example image",
        "security": [],
        "parameters": [number],
        "responses": {"200": png, **_problem_responses((*_COMMON_CODES, "not_found"))},
    }


def _operation(name: str, summary: str) -> dict[str, Any]:
    # A service may or may not require tokens.
    return {"operationId": name, "summary": summary, "security": [{"token": []}, {}]}


def _success_response(schema: str) -> dict[str, Any]:
    return {
        "description": "Success.",
        "headers": _REQUEST_ID_HEADER,
        "content": {"application/json": {"schema": ref(schema)}},
    }


def _problem_responses(codes: Sequence[str]) -> dict[str, Any]:
    """Return the responses for error codes, grouped by status."""
    statuses = sorted({PROBLEM_TYPES[code].status for code in codes})
    responses: dict[str, Any] = {}
    for status in statuses:
        lines = [
            f"`{c}`: {PROBLEM_TYPES[c].title}." for c in codes if PROBLEM_TYPES[c].status == status
        ]
        headers: dict[str, Any] = dict(_REQUEST_ID_HEADER)
        if status in (429, 503):
            headers |= _RETRY_AFTER_HEADER
        if status == 401:
            headers["WWW-Authenticate"] = {"required": True, "schema": {"type": "string"}}
        responses[str(status)] = {
            "description": " ".join(lines),
            "headers": headers,
            "content": {MEDIA_TYPE: {"schema": ref("Problem")}},
        }
    return responses


def _query_parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    schema_only = {key: value for key, value in schema.items() if key != "description"}
    return {
        "name": name,
        "in": "query",
        "description": schema.get("description", ""),
        "schema": schema_only,
    }


def _adapter_name_parameter() -> dict[str, Any]:
    schema = {"type": "string", "pattern": _ADAPTER_NAME}
    return {"name": "name", "in": "path", "required": True, "schema": schema}
