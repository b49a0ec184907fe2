"""JSON Schemas of the replies, generated from :mod:`loraseg.api_types` for the OpenAPI document."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from loraseg import api_types as types
from loraseg.serving.http_api.parameters import MODES
from loraseg.serving.http_api.problems import PROBLEM_TYPES

__all__ = ["SCHEMAS", "ref"]

_PREFIX = "#/components/schemas/"
# Names in the document, which generated clients of other languages use as class names.
_TYPES: Mapping[str, type] = {
    "Problem": types.Problem,
    "UsedAdapter": types.UsedAdapterInfo,
    "SkippedAdapter": types.SkippedAdapterInfo,
    "ImageSize": types.ImageSize,
    "Rle": types.Rle,
    "Polygon": types.Polygon,
    "Reply": types.SegmentReply,
    "Adapter": types.AdapterInfo,
    "AdapterList": types.AdapterList,
    "LibraryName": types.LibraryName,
    "Library": types.LibraryInfo,
    "Health": types.Health,
    "Readiness": types.ReadinessInfo,
    "Example": types.Example,
    "Examples": types.ExampleList,
}


def ref(name: str) -> dict[str, Any]:
    """Return a reference to one of ``SCHEMAS``."""
    return {"$ref": f"{_PREFIX}{name}"}


class _SchemaGenerator(GenerateJsonSchema):
    """Leaves out titles and defaults: a reply's absent member is absent, not null."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])


def _generate() -> dict[str, Any]:
    _, document = TypeAdapter.json_schemas(
        [(name, "validation", TypeAdapter(cls)) for name, cls in _TYPES.items()],
        ref_template=_PREFIX + "{model}",
        schema_generator=_SchemaGenerator,
    )
    text = json.dumps(document["$defs"])
    for name, cls in _TYPES.items():
        text = text.replace(f'"{_PREFIX}{cls.__name__}"', f'"{_PREFIX}{name}"')
    definitions = json.loads(text)
    return {name: _tidy(definitions[cls.__name__]) for name, cls in _TYPES.items()}


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    schema.pop("title")
    # Attributes of the class are described member by member.
    schema["description"] = schema["description"].split("\n\n")[0].replace("\n", " ")
    return schema


def _schemas() -> dict[str, Any]:
    schemas = _generate()
    schemas["Problem"]["required"] = list(schemas["Problem"]["properties"])
    schemas["Problem"]["properties"]["code"]["enum"] = list(PROBLEM_TYPES)
    explanation = [field.name for field in fields(types.ReplyExplanation)]
    reply = schemas["Reply"]
    members = reply["properties"]
    members["mode"]["enum"] = list(MODES)
    reply["properties"] = {**{k: v for k, v in members.items() if k not in explanation}, **members}
    reply["required"] = [
        field.name
        for field in fields(types.SegmentReply)
        if field.default is MISSING and field.name not in (*explanation, "segmentation_mask")
    ]
    reply["description"] = (
        "Members that `return` does not name are absent; `explanation` stands for "
        f"{', '.join(explanation)}."
    )
    schemas["Adapter"]["required"].append("unavailable")
    return schemas | {
        "Card": {"type": "object", "description": "The adapter's card, without centroids."},
        "Base": {
            "type": "object",
            "description": "Base model, encoder, prompts, default settings.",
        },
    }


SCHEMAS: Mapping[str, dict[str, Any]] = _schemas()
