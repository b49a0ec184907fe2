"""Requests: what a caller wants, as form fields and parts."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict

from loraseg.client.images import Upload

__all__ = ["Request", "SegmentOptions", "form_fields", "segment_batch_request", "segment_request"]

# Everything but the maps: explanations with thousands of adapters are long.
_MAX_TEXT_BYTES = 16 * 2**20


class SegmentOptions(TypedDict, total=False):
    """What may be said about a segmentation; the endpoint decides what is left out.

    Attributes:
        library: The endpoint's name of a library.
        top_k: Number of nearest adapters that are fused.
        temperature: Sharpness of their weights.
        adapters: Names of adapters: with ``rain``, exactly those that are named are used; with
            ``-rain``, it is not used.
        mode: Nearest adapters, all adapters alike, or none.
        maps: Further maps to return: ``confidence``, ``entropy``.
        tiling: Whether the image is cut into overlapping tiles.
        timeout_s: For this call, instead of the client's.
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
    """One request, ready to be sent any number of times.

    Attributes:
        method: Of HTTP.
        path: Below the endpoint's URL.
        params: Of the query.
        form: Fields of a multipart body.
        files: Its files: field, (name, bytes, media type).
        max_response_bytes: Most bytes of an answer.
    """

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict[str, str])
    form: Mapping[str, str] = field(default_factory=dict[str, str])
    files: tuple[tuple[str, tuple[str, bytes, str]], ...] = ()
    max_response_bytes: int = 4 * _MAX_TEXT_BYTES

    def with_timeout(self, timeout_s: float) -> "Request":
        """Tell the endpoint how long its answer is waited for; it need not work on after that."""
        if not self.form:
            return self
        return replace(self, form={**self.form, "timeout_s": f"{max(timeout_s, 0.001):.3f}"})


def form_fields(classes: Sequence[str], options: SegmentOptions) -> dict[str, str]:
    """Return the parameters of a segmentation, without those that are left to the endpoint."""
    wanted = ("mask", *sorted(set(options.get("maps", ()))), "explanation")
    named = {
        "library": options.get("library"),
        "top_k": options.get("top_k"),
        "temperature": options.get("temperature"),
        "adapters": ",".join(options.get("adapters", ())) or None,
        "mode": options.get("mode"),
        "tiling": options.get("tiling"),
    }
    said = {name: str(value) for name, value in named.items() if value is not None}
    return {"classes": json.dumps(list(classes)), "return": ",".join(wanted), **said}


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
    """Return the request for several images; the limit is that of one line of the answer."""
    return Request(
        method="POST",
        path="/v1/segment/batch",
        form=form,
        files=tuple(_file_part("images", place, upload) for place, upload in enumerate(uploads)),
        max_response_bytes=max(_max_response_bytes(upload, form) for upload in uploads),
    )


def _file_part(name: str, index: int, upload: Upload) -> tuple[str, tuple[str, bytes, str]]:
    # File names may tell what they should not, and the endpoint needs none.
    return name, (str(index), upload.data, upload.content_type)


def _max_response_bytes(upload: Upload, form: Mapping[str, str]) -> int:
    """Return how long an honest answer can be: maps as PNG that did not compress, in base64."""
    maps = form["return"].count(",")
    rows = max(max(shape) for shape in upload.shapes)
    return _MAX_TEXT_BYTES + maps * ((upload.pixels + rows) * 3 // 2)
