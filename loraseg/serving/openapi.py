"""The OpenAPI document, by hand as the reading of requests is, for speed and strictness."""

from collections.abc import Sequence
from typing import Any

from loraseg.serving.bodies import RAW_TYPES
from loraseg.serving.config import ServiceConfig
from loraseg.serving.params import MODES, RETURNS, TEMPERATURES, TILINGS, TOP_K
from loraseg.serving.problems import KINDS, MEDIA_TYPE
from loraseg.serving.schemas import SCHEMAS, ref

__all__ = ["openapi_document"]

_ABOUT = """\
An image and any list of class names go in, a label map and the reason for it come out: which
adapters of the library were nearest to the image, and with what weights they were fused."""
_ADAPTER_NAME = "^[a-z0-9][a-z0-9._-]{0,127}$"
_REQUEST_ID = {
    "X-Request-ID": {
        "description": "The request's own, if it is of at most 64 of A-Z, a-z, 0-9, '.', '_', '-'.",
        "schema": {"type": "string"},
    }
}
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}
# What any request may meet, with a token, and with a body.
_ALWAYS = ("bad_request", "invalid", "body_timeout", "body_too_large", "internal")
_WITH_TOKEN = (*_ALWAYS, "unauthorized", "forbidden")
_WITH_LIBRARY = (*_WITH_TOKEN, "no_such_library", "not_ready", "draining")
_SEGMENTING = (
    *(*_WITH_LIBRARY, "no_such_adapter", "unsupported_media_type", "bad_image"),
    *("too_many_requests", "overloaded", "replica_lost", "adapters_unavailable", "deadline"),
)


def openapi_document(config: ServiceConfig) -> dict[str, Any]:
    """Return the document of one service: its libraries, limits and defaults are in it."""
    parameters = _parameters(config)
    library = [_query("library", parameters["library"])]
    return {
        "openapi": "3.1.0",
        "info": {"title": "loraseg", "version": "1", "description": _ABOUT},
        "paths": {
            "/v1/segment": {"post": _segment(config, parameters)},
            "/v1/segment/batch": {"post": _batch(config, parameters)},
            "/v1/adapters": {
                "get": _get("adapters", "The adapters of a library", "AdapterList", library)
            },
            "/v1/adapters/{name}": {
                "get": _get(
                    "adapter",
                    "An adapter's card",
                    "Card",
                    [_adapter_name(), *library],
                    codes=(*_WITH_LIBRARY, "no_such_adapter"),
                )
            },
            "/v1/library": {"get": _get("library", "The state of a library", "Library", library)},
            "/v1/library/refresh": {
                "post": _get(
                    "refresh", "Look for a newer generation now (role admin)", "Library", library
                )
            },
            "/v1/base": {
                "get": _get("base", "What is frozen", "Base", [], codes=(*_WITH_TOKEN, "not_ready"))
            },
            "/v1/examples": {"get": _open("examples", "Pictures to try", "Examples")},
            "/v1/examples/{n}.png": {"get": _example()},
            "/healthz": {"get": _open("healthz", "Whether the process answers", "Health")},
            "/readyz": {
                "get": _open(
                    "readyz",
                    "Whether models and catalogs are loaded",
                    "Readiness",
                    codes=(*_ALWAYS, "not_ready"),
                )
            },
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _parameters(config: ServiceConfig) -> dict[str, dict[str, Any]]:
    limits, libraries = config.limits, list(config.libraries)
    return {
        "classes": {
            "type": "string",
            "minLength": 1,
            "description": "Names between commas, or a JSON array of strings; repeated, they are "
            f"joined. At most {limits.classes} of at most {limits.class_name_chars} characters, "
            "distinct without regard to case and blanks. Their order gives the ids.",
            "examples": ["road, car, sky", '["road", "traffic light"]'],
        },
        "library": {"type": "string", "enum": libraries, "default": libraries[0]},
        "top_k": {
            "type": "integer",
            "minimum": 1,
            "maximum": TOP_K,
            "description": "How many of the nearest adapters are fused.",
        },
        "temperature": {
            "type": "number",
            "minimum": TEMPERATURES[0],
            "maximum": TEMPERATURES[1],
            "description": "Sharpness of their weights: the smaller, the more the nearest counts.",
        },
        "adapters": {
            "type": "string",
            "description": "Names between commas: `rain` for these and no others, whatever their "
            "distance; `-rain` for all but these. Of no effect with mode=base.",
        },
        "mode": {
            "type": "string",
            "enum": list(MODES),
            "default": MODES[0],
            "description": "The nearest adapters, none, or all alike.",
        },
        "return": {
            "type": "string",
            "pattern": "^ *({0}) *(, *({0}) *)*$".format("|".join(RETURNS)),
            "default": "mask,explanation",
            "description": f"Between commas: {', '.join(RETURNS)}.",
        },
        "tiling": {
            "type": "string",
            "enum": list(TILINGS),
            "default": TILINGS[0],
            "description": "Whether the image is cut into overlapping tiles; auto: by its size.",
        },
        "timeout_s": {
            "type": "number",
            "minimum": 0.001,
            "description": "When the answer is worthless; the service waits no longer than "
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


def _segment(config: ServiceConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    raw = {"schema": {"type": "string", "format": "binary"}}
    headers = {
        name: {"description": text, "schema": {"type": "string"}}
        for name, text in (
            ("X-Loraseg-Classes", "JSON array; absent if over 4096 characters, as the others."),
            ("X-Loraseg-Adapters", "JSON array, as `adapters` of the JSON reply."),
            ("X-Loraseg-Mode", "As `mode`."),
            ("X-Loraseg-Generation", "As `generation`."),
            ("X-Loraseg-Fallback", "JSON text, as `fallback`."),
        )
    }
    return {
        **_operation("segment", "Segment one image"),
        "description": "With `Accept: image/png` the answer is the label map alone, as an indexed "
        "PNG with the classes' colours. Parameters stand in the query or in the form. At most "
        f"{config.limits.pixels} pixels and {config.limits.body_bytes} bytes.",
        "parameters": [_query(name, schema) for name, schema in parameters.items()],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": _form(parameters, "image", {}),
                **dict.fromkeys(RAW_TYPES, raw),
            },
        },
        "responses": {
            "200": {
                "description": "The label map, and why it is so.",
                "headers": {**_REQUEST_ID, **headers},
                "content": {
                    "application/json": {"schema": ref("Reply")},
                    "image/png": raw,
                },
            },
            **_problems(_SEGMENTING),
        },
    }


def _batch(config: ServiceConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    most = {"type": "array", "minItems": 1, "maxItems": config.limits.images}
    return {
        **_operation("segment_batch", "Segment several images, answered as they finish"),
        "description": "A line of JSON for each image: `index`, `file`, and what /v1/segment "
        "answers, or `error` with problem details. The last line is `done` and `failed`, the "
        "counts; without it, the stream was cut off.",
        "parameters": [_query(name, schema) for name, schema in parameters.items()],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": _form(parameters, "images", most)},
        },
        "responses": {
            "200": {
                "description": "Newline-delimited JSON.",
                "headers": _REQUEST_ID,
                "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
            },
            **_problems(_SEGMENTING),
        },
    }


def _form(parameters: dict[str, Any], field: str, array: dict[str, Any]) -> dict[str, Any]:
    file: dict[str, Any] = {"type": "string", "format": "binary"}
    return {
        "schema": {
            "type": "object",
            "properties": {field: {**array, "items": file} if array else file, **parameters},
            "required": [field],
        },
        "encoding": {field: {"contentType": "image/png, image/jpeg"}},
    }


def _get(
    name: str,
    summary: str,
    schema: str,
    parameters: list[dict[str, Any]],
    *,
    codes: Sequence[str] = _WITH_LIBRARY,
) -> dict[str, Any]:
    return {
        **_operation(name, summary),
        "parameters": parameters,
        "responses": {"200": _good(schema), **_problems(codes)},
    }


def _open(
    name: str, summary: str, schema: str, *, codes: Sequence[str] = _ALWAYS
) -> dict[str, Any]:
    responses = {"200": _good(schema), **_problems(codes)}
    return {"operationId": name, "summary": summary, "security": [], "responses": responses}


def _example() -> dict[str, Any]:
    number = {"name": "n", "in": "path", "required": True, "schema": {"type": "integer"}}
    picture = {
        "description": "A scene of the miniature world.",
        "headers": _REQUEST_ID,
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    }
    return {
        "operationId": "example",
        "summary": "A picture to try",
        "security": [],
        "parameters": [number],
        "responses": {"200": picture, **_problems((*_ALWAYS, "not_found"))},
    }


def _operation(name: str, summary: str) -> dict[str, Any]:
    # Either: whether tokens are asked for is up to whoever runs the service.
    return {"operationId": name, "summary": summary, "security": [{"token": []}, {}]}


def _good(schema: str) -> dict[str, Any]:
    return {
        "description": "As described.",
        "headers": _REQUEST_ID,
        "content": {"application/json": {"schema": ref(schema)}},
    }


def _problems(codes: Sequence[str]) -> dict[str, Any]:
    """Return the responses of some problems, those of one status together."""
    statuses = sorted({KINDS[code].status for code in codes})
    found: dict[str, Any] = {}
    for status in statuses:
        lines = [f"`{c}`: {KINDS[c].title}." for c in codes if KINDS[c].status == status]
        headers: dict[str, Any] = dict(_REQUEST_ID)
        if status in (429, 503):
            headers |= _RETRY_AFTER
        if status == 401:
            headers["WWW-Authenticate"] = {"required": True, "schema": {"type": "string"}}
        found[str(status)] = {
            "description": " ".join(lines),
            "headers": headers,
            "content": {MEDIA_TYPE: {"schema": ref("Problem")}},
        }
    return found


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    described = {key: value for key, value in schema.items() if key != "description"}
    return {
        "name": name,
        "in": "query",
        "description": schema.get("description", ""),
        "schema": described,
    }


def _adapter_name() -> dict[str, Any]:
    schema = {"type": "string", "pattern": _ADAPTER_NAME}
    return {"name": "name", "in": "path", "required": True, "schema": schema}
