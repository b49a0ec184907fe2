"""Encode results: JSON fields, indexed PNG, headers."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from loraseg.data.labels import LabelSpace
from loraseg.data.mask_encodings.polygons import outline_polygons
from loraseg.data.mask_encodings.rle import encode_rle
from loraseg.data.masks import encode_mask
from loraseg.errors import DatasetError, ServiceError
from loraseg.inference.request import SegmentResult
from loraseg.segment.render import grey_png, overlay
from loraseg.serving.http_api.parameters import SegmentParameters
from loraseg.tensor_types import ndarray

__all__ = [
    "explanation_fields",
    "json_fields",
    "label_map_png",
    "png_headers",
    "round_milliseconds",
]

# Clients and proxies reject longer header lines.
_MAX_HEADER_CHARS = 4096
_DIGITS = 6
_ROWS_PER_BLOCK = 256


def json_fields(
    image: ndarray, parameters: SegmentParameters, result: SegmentResult
) -> dict[str, Any]:
    """Return the fields of a JSON reply that depend on the pixels; slow for large images.

    Args:
        image: RGB, uint8 (h, w, 3).
        parameters: Of the request.
        result: Its label map is (h, w).

    Raises:
        ServiceError: ``invalid``: the polygons have too many corners.
    """
    labels, space = result.label_map, parameters.classes
    height, width = labels.shape
    fields: dict[str, Any] = {
        "image": {"width": width, "height": height},
        "classes": list(space.names),
        "class_map": {str(index): name for index, name in enumerate(space.names)},
        "palette": space.palette.tolist(),
        "shares": _class_shares(labels, space),
    }
    if "mask" in parameters.returns:
        fields["segmentation_mask"] = _base64_text(encode_mask(labels, space))
    for name, values in (("confidence", result.confidence), ("entropy", result.entropy)):
        if name in parameters.returns and values is not None:
            fields[name] = _base64_text(grey_png(values))
    if "overlay" in parameters.returns:
        fields["overlay"] = _base64_text(_overlay_png(image, labels, parameters))
    if "rle" in parameters.returns:
        fields["rle"] = encode_rle(labels, range(len(space)))
    if "polygons" in parameters.returns:
        fields["polygons"] = _polygons(labels, space)
    return fields


def explanation_fields(result: SegmentResult, library: str) -> dict[str, Any]:
    """Return the fields of :class:`loraseg.api_types.ReplyExplanation` except ``timing_ms``."""
    explanation = result.explanation
    return {
        "mode": explanation.mode,
        "library": library,
        "generation": result.generation,
        "base": explanation.base,
        "mix": explanation.mix,
        "adapters": [asdict(used) for used in explanation.adapters],
        "fallback": explanation.fallback,
        "skipped": [failure.to_json() for failure in result.skipped],
        "tiles": result.tiles,
        "batch": result.batch_size,
    }


def label_map_png(parameters: SegmentParameters, result: SegmentResult) -> bytes:
    """Return the label map as an indexed PNG with the classes' colours."""
    return encode_mask(result.label_map, parameters.classes)


def png_headers(parameters: SegmentParameters, result: SegmentResult) -> dict[str, str]:
    """Return the headers that explain a PNG; headers that would be too long are left out."""
    explanation = result.explanation
    headers = {
        "X-Loraseg-Classes": json.dumps(parameters.classes.names),
        "X-Loraseg-Adapters": json.dumps([asdict(used) for used in explanation.adapters]),
        "X-Loraseg-Mode": explanation.mode,
    }
    if result.generation is not None:
        headers["X-Loraseg-Generation"] = str(result.generation)
    if explanation.fallback is not None:
        headers["X-Loraseg-Fallback"] = json.dumps(explanation.fallback)
    return {name: text for name, text in headers.items() if len(text) <= _MAX_HEADER_CHARS}


def round_milliseconds(timing: Mapping[str, float]) -> dict[str, float]:
    """Round to three decimals."""
    return {stage: round(float(value), 3) for stage, value in timing.items()}


def _overlay_png(image: ndarray, labels: ndarray, parameters: SegmentParameters) -> bytes:
    picture = np.empty_like(image)
    # In blocks of rows, since blending takes several float arrays of its input's size.
    for top in range(0, len(labels), _ROWS_PER_BLOCK):
        rows = slice(top, top + _ROWS_PER_BLOCK)
        picture[rows] = overlay(
            image[rows], labels[rows], parameters.classes, opacity=parameters.opacity
        )
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _polygons(labels: ndarray, space: LabelSpace) -> list[dict[str, Any]]:
    try:
        return outline_polygons(labels, range(len(space)))
    except DatasetError as error:
        raise ServiceError("invalid", f"return: {error}") from error


def _class_shares(labels: ndarray, space: LabelSpace) -> dict[str, float]:
    counts = np.bincount(labels.reshape(-1), minlength=len(space))
    return {
        name: round(int(count) / labels.size, _DIGITS)
        for name, count in zip(space.names, counts, strict=False)
    }


def _base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
