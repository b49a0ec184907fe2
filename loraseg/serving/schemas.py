"""JSON Schemas of what the API returns, for its OpenAPI document."""

from collections.abc import Mapping
from typing import Any

from loraseg.serving.params import MODES
from loraseg.serving.problems import KINDS

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


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _or_null(schema: Schema, description: str) -> Schema:
    return {**schema, "type": [schema["type"], "null"], "description": description}


def _said(schema: Schema, description: str) -> Schema:
    return {**schema, "description": description}


_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_WHOLE: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_PNG: Schema = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"}
_VERSION: Schema = {"type": ["integer", "string"]}
_POINTS = _list({"type": "array", "items": _WHOLE, "minItems": 2, "maxItems": 2})

_EXPLANATION: Schema = {
    "mode": {"type": "string", "enum": list(MODES)},
    "library": _TEXT,
    "generation": _or_null(_WHOLE, "Of the catalog; null if no adapter was asked for."),
    "base": _said(_DIGEST, "sha256 of the frozen base model."),
    "mix": _or_null(_DIGEST, "Digest of the fused adapter; null for the bare base."),
    "adapters": _said(_list(ref("UsedAdapter")), "What was fused, nearest first."),
    "fallback": _or_null(_TEXT, "Why the bare base was used although adapters were asked for."),
    "skipped": _said(_list(ref("SkippedAdapter")), "Visible adapters that are out of service."),
    "tiles": _said(_WHOLE, "How many overlapping tiles the image was cut into; 1 for none."),
    "batch": _said(_WHOLE, "How many images went through the model together."),
    "timing_ms": _said(
        {"type": "object", "additionalProperties": _NUMBER},
        "By stage: decode, queue, embed, retrieve, load, segment, encode; and total.",
    ),
}

SCHEMAS: dict[str, Schema] = {
    "Problem": {
        **_object(
            {
                "type": _TEXT,
                "title": _TEXT,
                "status": _WHOLE,
                "detail": _TEXT,
                "code": {"type": "string", "enum": list(KINDS)},
                "request_id": _TEXT,
            }
        ),
        "description": "RFC 9457 problem details; `code` is stable, `detail` is for people.",
    },
    "UsedAdapter": _object(
        {
            "name": _TEXT,
            "version": _VERSION,
            "digest": _said(_DIGEST, "sha256 of the bytes that were used."),
            "weight": _NUMBER,
            "distance": _or_null(_NUMBER, "From the image to the adapter's centroid, if measured."),
        }
    ),
    "SkippedAdapter": _object(
        {"name": _TEXT, "version": _VERSION, "digest": _TEXT, "reason": _TEXT}
    ),
    "Rle": _object(
        {
            "class_id": _WHOLE,
            "size": _said(_list(_WHOLE), "Height and width."),
            "counts": _said(_TEXT, "Compressed run lengths, exactly as COCO writes them."),
            "area": _WHOLE,
        }
    ),
    "Polygon": _object(
        {
            "class_id": _WHOLE,
            "exterior": _said(_POINTS, "Corners (x, y) along the pixels' edges."),
            "holes": _list(_POINTS),
        }
    ),
    "Reply": {
        **_object(
            {
                "request_id": _TEXT,
                "image": _object({"width": _WHOLE, "height": _WHOLE}),
                "classes": _said(_list(_TEXT), "A class's place is its id in the label map."),
                "class_map": {"type": "object", "additionalProperties": _TEXT},
                "palette": _list(_list({"type": "integer", "minimum": 0, "maximum": 255})),
                "shares": _said(
                    {"type": "object", "additionalProperties": _NUMBER},
                    "Share of the pixels of each class.",
                ),
            },
            {
                "segmentation_mask": _said(_PNG, "Indexed: pixel values are class ids."),
                "confidence": _said(_PNG, "Grey: 255 times the score of the shown class."),
                "entropy": _said(_PNG, "Grey: 255 times the entropy of the classes' scores."),
                "overlay": _PNG,
                "rle": _list(ref("Rle")),
                "polygons": _list(ref("Polygon")),
                **_EXPLANATION,
            },
        ),
        "description": "Members that `return` does not name are absent; `explanation` stands for "
        f"{', '.join(_EXPLANATION)}.",
    },
    "Adapter": _object(
        {
            "name": _TEXT,
            "version": _WHOLE,
            "digest": _DIGEST,
            "size_bytes": _WHOLE,
            "classes": _list(_TEXT),
            "images": _or_null(_WHOLE, "It was trained on, if known."),
            "unavailable": _or_null(_TEXT, "Why it is out of service, if it is."),
        }
    ),
    "AdapterList": _object(
        {"library": _TEXT, "generation": _WHOLE, "adapters": _list(ref("Adapter"))}
    ),
    "Card": {"type": "object", "description": "The adapter's card, without centroids."},
    "Library": _object(
        {
            "library": _TEXT,
            "generation": _said(_WHOLE, "Of the catalog that is in use."),
            "loaded_s": _said(_NUMBER, "Seconds since it came into use."),
            "checked_s": _said(_NUMBER, "Seconds since the store confirmed that it is the newest."),
            "problem": _or_null(_TEXT, "Why the latest check failed."),
            "adapters": _said(_WHOLE, "That fit the base and are visible."),
            "unavailable": _said(_WHOLE, "Of these, how many are out of service."),
            "misfits": _said(_WHOLE, "Adapters that do not fit base or encoder."),
            "libraries": _said(
                _list(_object({"library": _TEXT})), "All; the first is the default."
            ),
        }
    ),
    "Base": {"type": "object", "description": "Base model, encoder, prompts, default settings."},
    "Health": _object({"status": _TEXT}),
    "Readiness": _object({"ready": _FLAG, "waiting_for": _list(_TEXT)}),
    "Examples": _object(
        {"examples": _list(_object({"name": _TEXT, "url": _TEXT, "classes": _list(_TEXT)}))}
    ),
}
