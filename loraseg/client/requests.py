"""Requests to an endpoint: form fields and files."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from loraseg.client.images import Upload

__all__ = ["Request", "SegmentOptions", "form_fields", "segment_batch_request", "segment_request"]

# Of a response without its maps; an explanation with thousands of adapters is long.
_MAX_TEXT_BYTES = 16 * 2**20


class SegmentOptions(TypedDict, total=False):
    """Options of a segmentation; the endpoint has a default for each.

    Attributes:
        library: The endpoint's name of a library.
        top_k: Number of nearest adapters to fuse.
        temperature: Of the mixing weights; smaller values favour the nearest adapter.
        adapters: Names: ``rain`` restricts the mix to the adapters so named, ``-rain`` excludes
            one.
        mode: ``fused``: the nearest adapters; ``uniform``: all, with equal weights; ``base``:
            none.
        maps: Further maps to return: ``confidence``, ``entropy``.
        tiling: Whether to cut the image into overlapping tiles.
        timeout_s: Of this call, instead of the client's.
    """

    library: str | None
    top_k: int | None
    temperature: float | None
    adapters: Sequence[str]
    mode: Literal["fused", "uniform", "base"] | None
    maps: Collection[Literal["confidence", "entropy"]]
    tiling: Literal["auto", "never", "always"] | None
    timeout_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One HTTP request; it may be sent repeatedly.

    Attributes:
        method: Of HTTP.
        path: Below the endpoint's URL.
        params: Of the query.
        form: Fields of a multipart body.
        files: Its files: field, (name, bytes, media type).
        max_response_bytes: Limit of the response, or of one line of a batch response.
    """

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict[str, str])
    form: Mapping[str, str] = field(default_factory=dict[str, str])
    files: tuple[tuple[str, tuple[str, bytes, str]], ...] = ()
    max_response_bytes: int = 4 * _MAX_TEXT_BYTES

    def with_timeout(self, timeout_s: float) -> "Request":
        """Return the request with the endpoint's time limit; unchanged without a form."""
        if not self.form:
            return self
        return replace(self, form={**self.form, "timeout_s": f"{max(timeout_s, 0.001):.3f}"})


def form_fields(classes: Sequence[str], options: SegmentOptions) -> dict[str, str]:
    """Return the form fields of a segmentation; options that are not set are left out."""
    returns = ("mask", *sorted(set(options.get("maps", ()))), "explanation")
    values = {
        "library": options.get("library"),
        "top_k": options.get("top_k"),
        "temperature": options.get("temperature"),
        "adapters": ",".join(options.get("adapters", ())) or None,
        "mode": options.get("mode"),
        "tiling": options.get("tiling"),
    }
    fields = {name: str(value) for name, value in values.items() if value is not None}
    return {"classes": json.dumps(list(classes)), "return": ",".join(returns), **fields}


def segment_request(upload: Upload, form: Mapping[str, str]) -> Request:
    """Return the request for one image."""
    return Request(
        method="POST",
        path="/v1/segment",
        form=form,
        files=(_file_part("image", 0, upload),),
        max_response_bytes=_max_response_bytes(upload, form),
    )


def segment_batch_request(uploads: Sequence[Upload], form: Mapping[str, str]) -> Request:
    """Return the request for several images."""
    return Request(
        method="POST",
        path="/v1/segment/batch",
        form=form,
        files=tuple(_file_part("images", index, upload) for index, upload in enumerate(uploads)),
        max_response_bytes=max(_max_response_bytes(upload, form) for upload in uploads),
    )


def _file_part(name: str, index: int, upload: Upload) -> tuple[str, tuple[str, bytes, str]]:
    # The real file name may be confidential, and the endpoint does not need it.
    return name, (str(index), upload.data, upload.content_type)


def _max_response_bytes(upload: Upload, form: Mapping[str, str]) -> int:
    """Return the size of the longest valid response: incompressible maps as PNG in base64."""
    maps = form["return"].count(",")
    rows = max(max(shape) for shape in upload.shapes)
    return _MAX_TEXT_BYTES + maps * ((upload.pixels + rows) * 3 // 2)
