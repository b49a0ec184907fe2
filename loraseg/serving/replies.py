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
from loraseg.data.masks import encode_mask
from loraseg.data.polygons import outline_polygons
from loraseg.data.rle import encode_rle
from loraseg.errors import DatasetError, ServiceError
from loraseg.segment.render import grey_png, overlay
from loraseg.serving.orders import Order, Outcome
from loraseg.serving.params import Ask
from loraseg.tensor_types import ndarray

__all__ = ["explanation", "json_members", "png_headers", "png_of"]

# Clients and proxies refuse longer header lines; the JSON reply has no such bound.
_MOST_HEADER_CHARS = 4096
_DIGITS = 6
_ROWS = 256


def json_members(order: Order, ask: Ask, outcome: Outcome) -> dict[str, Any]:
    """Return the members of a JSON reply that come from the pixels; slow for large images.

    Raises:
        ServiceError: ``invalid``: polygons of more corners than anybody can use.
    """
    result = outcome.result
    labels, space = result.label_map, ask.classes
    height, width = labels.shape
    members: dict[str, Any] = {
        "image": {"width": width, "height": height},
        "classes": list(space.names),
        "class_map": {str(index): name for index, name in enumerate(space.names)},
        "palette": space.palette.tolist(),
        "shares": _shares(labels, space),
    }
    if "mask" in ask.returns:
        members["segmentation_mask"] = _text(encode_mask(labels, space))
    for name, values in (("confidence", result.confidence), ("entropy", result.entropy)):
        if name in ask.returns and values is not None:
            members[name] = _text(grey_png(values))
    if "overlay" in ask.returns:
        members["overlay"] = _text(_overlay_png(order.image, labels, ask))
    if "rle" in ask.returns:
        members["rle"] = encode_rle(labels, range(len(space)))
    if "polygons" in ask.returns:
        members["polygons"] = _polygons(labels, space)
    return members


def explanation(outcome: Outcome, library: str) -> dict[str, Any]:
    """Return the members that say how the result came about, all but ``timing_ms``."""
    why = outcome.result.explanation
    return {
        "mode": why.mode,
        "library": library,
        "generation": outcome.generation,
        "base": why.base,
        "mix": why.mix,
        "adapters": [asdict(used) for used in why.adapters],
        "fallback": why.fallback,
        "skipped": [asdict(skipped) for skipped in outcome.skipped],
        "tiles": outcome.result.tiles,
        "batch": outcome.batch,
    }


def png_of(ask: Ask, outcome: Outcome) -> bytes:
    """Return the label map as an indexed PNG with the classes' colours."""
    return encode_mask(outcome.result.label_map, ask.classes)


def png_headers(ask: Ask, outcome: Outcome) -> dict[str, str]:
    """Return the headers that explain a PNG; those that would be too long are left out."""
    why = outcome.result.explanation
    headers = {
        "X-Loraseg-Classes": json.dumps(ask.classes.names),
        "X-Loraseg-Adapters": json.dumps([asdict(used) for used in why.adapters]),
        "X-Loraseg-Mode": why.mode,
    }
    if outcome.generation is not None:
        headers["X-Loraseg-Generation"] = str(outcome.generation)
    if why.fallback is not None:
        headers["X-Loraseg-Fallback"] = json.dumps(why.fallback)
    return {name: text for name, text in headers.items() if len(text) <= _MOST_HEADER_CHARS}


def rounded_ms(timing: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds with three digits after the point."""
    return {stage: round(float(value), 3) for stage, value in timing.items()}


def _overlay_png(image: ndarray, labels: ndarray, ask: Ask) -> bytes:
    picture = np.empty_like(image)
    # By rows, since blending takes many times the bytes of what it blends.
    for top in range(0, len(labels), _ROWS):
        rows = slice(top, top + _ROWS)
        picture[rows] = overlay(image[rows], labels[rows], ask.classes, opacity=ask.opacity)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _polygons(labels: ndarray, space: LabelSpace) -> list[dict[str, Any]]:
    try:
        return outline_polygons(labels, range(len(space)))
    except DatasetError as error:
        raise ServiceError("invalid", f"return: {error}") from error


def _shares(labels: ndarray, space: LabelSpace) -> dict[str, float]:
    counts = np.bincount(labels.reshape(-1), minlength=len(space))
    return {
        name: round(int(count) / labels.size, _DIGITS)
        for name, count in zip(space.names, counts, strict=False)
    }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
