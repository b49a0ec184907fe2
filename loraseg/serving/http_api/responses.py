"""From outcomes to what goes over the wire: JSON members, indexed PNG, headers."""

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
from loraseg.inference.request import SegmentRequest, SegmentResult
from loraseg.segment.render import grey_png, overlay
from loraseg.serving.http_api.parameters import SegmentParameters
from loraseg.tensor_types import ndarray

__all__ = ["explanation_fields", "json_fields", "label_map_png", "png_headers"]

# Clients and proxies refuse longer header lines; the JSON reply has no such bound.
_MAX_HEADER_CHARS = 4096
_DIGITS = 6
_ROWS_PER_BLOCK = 256


def json_fields(
    request: SegmentRequest, parameters: SegmentParameters, result: SegmentResult
) -> dict[str, Any]:
    """Return the members of a JSON reply that come from the pixels; slow for large images.

    Raises:
        ServiceError: ``invalid``: polygons of more corners than anybody can use.
    """
    labels, space = result.label_map, parameters.classes
    height, width = labels.shape
    members: dict[str, Any] = {
        "image": {"width": width, "height": height},
        "classes": list(space.names),
        "class_map": {str(index): name for index, name in enumerate(space.names)},
        "palette": space.palette.tolist(),
        "shares": _class_shares(labels, space),
    }
    if "mask" in parameters.returns:
        members["segmentation_mask"] = _base64_text(encode_mask(labels, space))
    for name, values in (("confidence", result.confidence), ("entropy", result.entropy)):
        if name in parameters.returns and values is not None:
            members[name] = _base64_text(grey_png(values))
    if "overlay" in parameters.returns:
        members["overlay"] = _base64_text(_overlay_png(request.image, labels, parameters))
    if "rle" in parameters.returns:
        members["rle"] = encode_rle(labels, range(len(space)))
    if "polygons" in parameters.returns:
        members["polygons"] = _polygons(labels, space)
    return members


def explanation_fields(result: SegmentResult, library: str) -> dict[str, Any]:
    """Return the members that say how the result came about, all but ``timing_ms``."""
    why = result.explanation
    return {
        "mode": why.mode,
        "library": library,
        "generation": result.generation,
        "base": why.base,
        "mix": why.mix,
        "adapters": [asdict(used) for used in why.adapters],
        "fallback": why.fallback,
        "skipped": [failure.to_json() for failure in result.skipped],
        "tiles": result.tiles,
        "batch": result.batch_size,
    }


def label_map_png(parameters: SegmentParameters, result: SegmentResult) -> bytes:
    """Return the label map as an indexed PNG with the classes' colours."""
    return encode_mask(result.label_map, parameters.classes)


def png_headers(parameters: SegmentParameters, result: SegmentResult) -> dict[str, str]:
    """Return the headers that explain a PNG; those that would be too long are left out."""
    why = result.explanation
    headers = {
        "X-Loraseg-Classes": json.dumps(parameters.classes.names),
        "X-Loraseg-Adapters": json.dumps([asdict(used) for used in why.adapters]),
        "X-Loraseg-Mode": why.mode,
    }
    if result.generation is not None:
        headers["X-Loraseg-Generation"] = str(result.generation)
    if why.fallback is not None:
        headers["X-Loraseg-Fallback"] = json.dumps(why.fallback)
    return {name: text for name, text in headers.items() if len(text) <= _MAX_HEADER_CHARS}


def round_milliseconds(timing: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds with three digits after the point."""
    return {stage: round(float(value), 3) for stage, value in timing.items()}


def _overlay_png(image: ndarray, labels: ndarray, parameters: SegmentParameters) -> bytes:
    picture = np.empty_like(image)
    # By rows, since blending takes many times the bytes of what it blends.
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
