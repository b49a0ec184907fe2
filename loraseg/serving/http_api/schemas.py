"""JSON Schemas of what the API returns, for its OpenAPI document."""

from collections.abc import Mapping
from typing import Any

from loraseg.serving.http_api.parameters import MODES
from loraseg.serving.http_api.problems import PROBLEM_TYPES

__all__ = ["SCHEMAS", "ref"]

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    """Return a reference to one of ``SCHEMAS``."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }


def _array(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _nullable(schema: Schema, description: str) -> Schema:
    return {**schema, "type": [schema["type"], "null"], "description": description}


def _described(schema: Schema, description: str) -> Schema:
    return {**schema, "description": description}


_STRING: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_NON_NEGATIVE_INTEGER: Schema = {"type": "integer", "minimum": 0}
_BOOLEAN: Schema = {"type": "boolean"}
_DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_PNG: Schema = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"}
_VERSION: Schema = {"type": ["integer", "string"]}
_POINTS = _array({"type": "array", "items": _NON_NEGATIVE_INTEGER, "minItems": 2, "maxItems": 2})

_EXPLANATION: Schema = {
    "mode": {"type": "string", "enum": list(MODES)},
    "library": _STRING,
    "generation": _nullable(
        _NON_NEGATIVE_INTEGER, "Of the catalog; null if no adapter was asked for."
    ),
    "base": _described(_DIGEST, "sha256 of the frozen base model."),
    "mix": _nullable(_DIGEST, "Digest of the fused adapter; null for the bare base."),
    "adapters": _described(_array(ref("UsedAdapter")), "What was fused, nearest first."),
    "fallback": _nullable(_STRING, "Why the bare base was used although adapters were asked for."),
    "skipped": _described(
        _array(ref("SkippedAdapter")), "Visible adapters that are out of service."
    ),
    "tiles": _described(
        _NON_NEGATIVE_INTEGER, "How many overlapping tiles the image was cut into; 1 for none."
    ),
    "batch": _described(_NON_NEGATIVE_INTEGER, "How many images went through the model together."),
    "timing_ms": _described(
        {"type": "object", "additionalProperties": _NUMBER},
        "By stage: decode, queue, embed, retrieve, load, segment, encode; and total.",
    ),
}

SCHEMAS: dict[str, Schema] = {
    "Problem": {
        **_object(
            {
                "type": _STRING,
                "title": _STRING,
                "status": _NON_NEGATIVE_INTEGER,
                "detail": _STRING,
                "code": {"type": "string", "enum": list(PROBLEM_TYPES)},
                "request_id": _STRING,
            }
        ),
        "description": "RFC 9457 problem details; `code` is stable, `detail` is for people.",
    },
    "UsedAdapter": _object(
        {
            "name": _STRING,
            "version": _VERSION,
            "digest": _described(_DIGEST, "sha256 of the bytes that were used."),
            "weight": _NUMBER,
            "distance": _nullable(
                _NUMBER, "From the image to the adapter's centroid, if measured."
            ),
        }
    ),
    "SkippedAdapter": _object(
        {"name": _STRING, "version": _VERSION, "digest": _STRING, "reason": _STRING}
    ),
    "Rle": _object(
        {
            "class_id": _NON_NEGATIVE_INTEGER,
            "size": _described(_array(_NON_NEGATIVE_INTEGER), "Height and width."),
            "counts": _described(_STRING, "Compressed run lengths, exactly as COCO writes them."),
            "area": _NON_NEGATIVE_INTEGER,
        }
    ),
    "Polygon": _object(
        {
            "class_id": _NON_NEGATIVE_INTEGER,
            "exterior": _described(_POINTS, "Corners (x, y) along the pixels' edges."),
            "holes": _array(_POINTS),
        }
    ),
    "Reply": {
        **_object(
            {
                "request_id": _STRING,
                "image": _object({"width": _NON_NEGATIVE_INTEGER, "height": _NON_NEGATIVE_INTEGER}),
                "classes": _described(
                    _array(_STRING), "A class's place is its id in the label map."
                ),
                "class_map": {"type": "object", "additionalProperties": _STRING},
                "palette": _array(_array({"type": "integer", "minimum": 0, "maximum": 255})),
                "shares": _described(
                    {"type": "object", "additionalProperties": _NUMBER},
                    "Share of the pixels of each class.",
                ),
            },
            {
                "segmentation_mask": _described(_PNG, "Indexed: pixel values are class ids."),
                "confidence": _described(_PNG, "Grey: 255 times the score of the shown class."),
                "entropy": _described(_PNG, "Grey: 255 times the entropy of the classes' scores."),
                "overlay": _PNG,
                "rle": _array(ref("Rle")),
                "polygons": _array(ref("Polygon")),
                **_EXPLANATION,
            },
        ),
        "description": "Members that `return` does not name are absent; `explanation` stands for "
        f"{', '.join(_EXPLANATION)}.",
    },
    "Adapter": _object(
        {
            "name": _STRING,
            "version": _NON_NEGATIVE_INTEGER,
            "digest": _DIGEST,
            "size_bytes": _NON_NEGATIVE_INTEGER,
            "classes": _array(_STRING),
            "images": _nullable(_NON_NEGATIVE_INTEGER, "It was trained on, if known."),
            "unavailable": _nullable(_STRING, "Why it is out of service, if it is."),
        }
    ),
    "AdapterList": _object(
        {
            "library": _STRING,
            "generation": _NON_NEGATIVE_INTEGER,
            "adapters": _array(ref("Adapter")),
        }
    ),
    "Card": {"type": "object", "description": "The adapter's card, without centroids."},
    "Library": _object(
        {
            "library": _STRING,
            "generation": _described(_NON_NEGATIVE_INTEGER, "Of the catalog that is in use."),
            "loaded_s": _described(_NUMBER, "Seconds since it came into use."),
            "checked_s": _described(
                _NUMBER, "Seconds since the store confirmed that it is the newest."
            ),
            "problem": _nullable(_STRING, "Why the latest check failed."),
            "adapters": _described(_NON_NEGATIVE_INTEGER, "That fit the base and are visible."),
            "unavailable": _described(
                _NON_NEGATIVE_INTEGER, "Of these, how many are out of service."
            ),
            "misfits": _described(
                _NON_NEGATIVE_INTEGER, "Adapters that do not fit base or encoder."
            ),
            "libraries": _described(
                _array(_object({"library": _STRING})), "All; the first is the default."
            ),
        }
    ),
    "Base": {"type": "object", "description": "Base model, encoder, prompts, default settings."},
    "Health": _object({"status": _STRING}),
    "Readiness": _object({"ready": _BOOLEAN, "waiting_for": _array(_STRING)}),
    "Examples": _object(
        {"examples": _array(_object({"name": _STRING, "url": _STRING, "classes": _array(_STRING)}))}
    ),
}
